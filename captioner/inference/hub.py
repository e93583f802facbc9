"""Export a checkpoint: to the folder of a Hugging Face Space, or as a model on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from captioner.errors import CaptionerError, ConfigError, first_line
from captioner.files import atomic_dir
from captioner.model import checkpoint as checkpoints
from captioner.model.checkpoint import Checkpoint

_ROOT = Path(__file__).resolve().parents[2]
_TRAINING = "# Training"  # the comment above the requirements that a Space does not need

_CPU_BUILD = """\
# On a Space without a GPU, uncomment the next line for PyTorch's CPU build, which is much smaller:
# --extra-index-url https://download.pytorch.org/whl/cpu
"""

_SPACE = """
# Captions with attention

Upload a photo to get a caption, and for every word a heat map of where the model looked.
Attention shows where the decoder read; it does not prove cause. The end of the page describes the
training data and the model's limits.
"""


def write_space(folder: Path, checkpoint: str | Path) -> None:
    """Write a Space that runs the page. ``folder`` appears whole or not at all.

    Args:
        folder: must be empty or missing.
        checkpoint: a folder or Hub id.

    Raises:
        ConfigError: ``folder`` is not empty, or this is not a clone of the project.
        CheckpointError: the checkpoint cannot be loaded.
        WriteError: ``folder`` cannot be written.
    """
    if not (_ROOT / "app.py").is_file():
        raise ConfigError(
            "a Space needs app.py and README.md, which pip does not install: export from a "
            "clone of the project"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: choose another --space")
    checkpoints.load(checkpoint)  # refuses a damaged one
    source = checkpoints.find(checkpoint)
    with atomic_dir(folder) as partial:
        shutil.copy(_ROOT / "app.py", partial)
        shutil.copy(_ROOT / "LICENSE", partial)
        shutil.copytree(
            _ROOT / "captioner",
            partial / "captioner",
            ignore=shutil.ignore_patterns("__pycache__", "*.pyi"),
        )
        home = partial / "assets" / "checkpoint"
        home.mkdir(parents=True)
        for name in (checkpoints.WEIGHTS, checkpoints.CONFIG, checkpoints.CARD):
            shutil.copy(source / name, home)
        _, front, _ = (_ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        (partial / "README.md").write_text(f"---\n{front}---\n{_SPACE}", encoding="utf-8")
        needed, _, _ = (_ROOT / "requirements.txt").read_text().partition(_TRAINING)
        (partial / "requirements.txt").write_text(f"{_CPU_BUILD}\n{needed}")


def push_to_hub(checkpoint: Checkpoint, name: str, *, private: bool = False) -> str:
    """Upload a checkpoint to the Hugging Face Hub as a model; return its URL.

    ``Captioner.from_pretrained("user/name")`` can then load it. The access token is that of
    ``hf auth login`` or ``HF_TOKEN``.

    Args:
        checkpoint: its model may be on any device.
        name: "user/name", or a name alone for the token's owner; created if it does not exist.
        private: whether only its owner can see it; for a new one.

    Raises:
        CaptionerError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = None
    try:
        # Without an owner the Hub takes the token's.
        url = api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
            checkpoints.save(Path(folder, "checkpoint"), checkpoint)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=Path(folder, "checkpoint"),
                commit_message="Upload a captioner checkpoint",
            )
    except Exception as error:
        exists = f"; the repository {url} exists" if url else ""
        raise CaptionerError(
            f"cannot upload to {name} ({type(error).__name__}: {first_line(error)[:160]}): check "
            f"the name, your internet connection, and the token of `hf auth login`{exists}"
        ) from error
    return str(url)
