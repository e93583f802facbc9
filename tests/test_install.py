"""What pip makes of the project, in a clean environment: the Space's folder, the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from captioner import Captioner, __version__
from captioner.inference.captioner import SHIPPED_CHECKPOINT
from captioner.inference.hub import write_space

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end without what this session's Python would find."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "NO_PROXY": "127.0.0.1", **more}
    # pip keeps what it has fetched where the machine does, or the network would be asked again.
    kept = Path(os.environ.get("PIP_CACHE_DIR", Path.home() / ".cache" / "pip"))
    environment |= {"PIP_CACHE_DIR": str(kept), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install") / "space"
    write_space(folder, SHIPPED_CHECKPOINT)
    return folder


@pytest.fixture(scope="module")
def python(space: Path) -> Path:
    """The Python of a new environment with what the Space's requirements name."""
    home = space.parent / "environment"
    run(sys.executable, "-m", "venv", home, cwd=space)
    run(home / "bin" / "pip", "install", "-q", "-r", "requirements.txt", cwd=space)
    return home / "bin" / "python"


# Starts the page where there is no network but the machine's own, asks it, and tells what it took.
_ALONE = """
import json, subprocess, sys, time
from pathlib import Path
from urllib.request import urlopen
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
started = time.monotonic()
page = subprocess.Popen([sys.argv[1], "app.py", "--port", "7860"], stdout=sys.stderr)
try:
    while True:
        try:
            health = json.load(urlopen("http://127.0.0.1:7860/healthz"))
            break
        except OSError:
            assert page.poll() is None
            time.sleep(0.1)
    ready = time.monotonic() - started
    ask = "import sys, json; from gradio_client import Client, handle_file; "
    ask += "client = Client('http://127.0.0.1:7860', verbose=False); "
    ask += "print(json.dumps(client.predict(handle_file(sys.argv[1]), api_name='/caption')))"
    done = subprocess.run([sys.argv[1], "-c", ask, sys.argv[2]], capture_output=True, check=True)
    status = Path(f"/proc/{page.pid}/status").read_text().splitlines()
    peak = int(next(line for line in status if "VmHWM" in line).split()[1])
    caption = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"ready": ready, "peak": peak, "health": health, "caption": caption}))
finally:
    page.terminate()
    page.wait()
"""


def test_the_space_runs_from_its_folder_alone_without_a_network(
    space: Path, python: Path, captioner: Captioner, example_photos: list[Path]
) -> None:
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("ip") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no network can be taken away here: unshare --net and ip are needed")
    done = run(*alone, sys.executable, "-c", _ALONE, python, example_photos[0], cwd=space)
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"\nthe Space: ready after {told['ready']:.1f} s, peak {told['peak'] / 1e6:.2f} GB")
    assert told["health"] == {"status": "ready"}
    assert told["caption"] == captioner.caption(example_photos[0]).to_dict()
    assert told["ready"] < 60
    assert told["peak"] < 2_000_000  # kB


def test_the_wheel_captions_from_any_folder(
    python: Path, captioner: Captioner, example_photos: list[Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"captioner-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"captioner/shipped/{path.name}" for path in SHIPPED_CHECKPOINT.iterdir()} <= names
    assert {"captioner/py.typed", "captioner/viewer/page.html"} <= names
    assert not [name for name in names if not name.startswith(("captioner/", "captioner-"))]

    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    photo = example_photos[0]
    started = time.monotonic()
    done = run(python.with_name("captioner"), "caption", photo, cwd=tmp_path)
    print(f"\nfirst caption of a fresh installation after {time.monotonic() - started:.1f} s")
    assert done.stdout == f"{photo}\t{captioner.caption(photo).text}\n"
    maps = run(python.with_name("captioner"), "caption", photo, "--heatmaps", "maps", "--format",
               "html", cwd=tmp_path)  # fmt: skip
    assert maps.stderr == ""
    assert (tmp_path / "maps" / f"{photo.name}.html").stat().st_size > 10_000
    told = run(python, "-c", "import captioner; print(*captioner.__all__)", cwd=tmp_path)
    import captioner as package

    assert told.stdout.split() == package.__all__
