# The page in a container. Build: docker build -t captioner .
# Run: docker run --stop-timeout 30 -p 7860:7860 captioner
FROM python:3.11-slim-trixie

RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
ENV PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 GRADIO_SERVER_NAME=0.0.0.0

# PyTorch's CPU build leaves out NVIDIA's libraries. The page does not need the training packages.
COPY --chown=user requirements.txt .
RUN sed -i '/^# Training/,$d' requirements.txt \
    && pip install --no-cache-dir --user --extra-index-url https://download.pytorch.org/whl/cpu \
    -r requirements.txt
COPY --chown=user app.py LICENSE README.md ./
COPY --chown=user captioner captioner
COPY --chown=user assets/checkpoint assets/checkpoint

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
# The exec form delivers SIGTERM to Python, which finishes pending requests and ends within 30 seconds.
# `docker stop` waits only 10 seconds unless --stop-timeout says otherwise.
STOPSIGNAL SIGTERM
CMD ["python", "app.py", "--port", "7860"]
