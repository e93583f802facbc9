"""Installations by pip in a clean environment: the Space's folder and the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import captioner as package
from captioner import Captioner, __version__
from captioner.inference.captioner import SHIPPED_CHECKPOINT
from captioner.inference.hub import write_space

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end without the environment of this session's Python."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "NO_PROXY": "127.0.0.1"}
    # pip's usual cache, although HOME is another.
    environment["PIP_CACHE_DIR"] = str(Path.home() / ".cache" / "pip")
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
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
    """The Python of a new environment with the Space's requirements."""
    home = space.parent / "environment"
    run(sys.executable, "-m", "venv", home, cwd=space)
    run(home / "bin" / "pip", "install", "-q", "-r", "requirements.txt", cwd=space)
    return home / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git does not ignore."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--outdir", "dist", folder / "source", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


# Starts the page where the loopback is the only network, calls it, and prints what that took.
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
    call = "import sys, json; from gradio_client import Client, handle_file; "
    call += "client = Client('http://127.0.0.1:7860', verbose=False); "
    call += "print(json.dumps(client.predict(handle_file(sys.argv[1]), api_name='/caption')))"
    done = subprocess.run([sys.argv[1], "-c", call, sys.argv[2]], capture_output=True, check=True)
    status = Path(f"/proc/{page.pid}/status").read_text().splitlines()
    peak = int(next(line for line in status if "VmHWM" in line).split()[1])
    caption = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"ready": ready, "peak": peak, "health": health, "caption": caption}))
finally:
    page.terminate()
    page.wait()
"""


def test_space_runs_alone_without_a_network(
    space: Path, python: Path, captioner: Captioner, example_photos: list[Path]
) -> None:
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("ip") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("the network cannot be taken away here: unshare --net and ip are needed")
    done = run(*alone, sys.executable, "-c", _ALONE, python, example_photos[0], cwd=space)
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"\nthe Space: ready after {report['ready']:.1f} s, peak {report['peak'] / 1e6:.2f} GB")
    assert report["health"] == {"status": "ready"}
    expected = captioner.caption(example_photos[0])
    assert report["caption"]["text"] == expected.text
    log_probability = report["caption"]["beams"][0]["log_probability"]
    assert log_probability == pytest.approx(expected.log_probability, abs=1e-3)
    assert report["ready"] < 60
    assert report["peak"] < 2_000_000  # kB


def test_wheel_holds_the_package_and_the_checkpoint(wheel: Path) -> None:
    assert wheel.name == f"captioner-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "captioner").rglob("*.*")
        if path.is_file() and path.suffix not in (".pyc", ".pyi")
    }
    assert "captioner/py.typed" in modules
    shipped = {f"captioner/shipped/{path.name}" for path in SHIPPED_CHECKPOINT.iterdir()}
    assert {name for name in names if name.startswith("captioner/")} == modules | shipped
    assert all(name.startswith(("captioner/", "captioner-")) for name in names)


def test_installed_wheel_captions_from_any_folder(
    wheel: Path, python: Path, captioner: Captioner, example_photos: list[Path], tmp_path: Path
) -> None:
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    command, photo = python.with_name("captioner"), example_photos[0]
    started = time.monotonic()
    done = run(command, "caption", photo, cwd=tmp_path)
    print(f"\nfirst caption of a fresh installation after {time.monotonic() - started:.1f} s")
    assert done.stdout == f"{photo}\t{captioner.caption(photo).text}\n"
    maps = run(command, "caption", photo, "--heatmaps", "maps", "--format", "html", cwd=tmp_path)
    assert maps.stderr == ""
    assert (tmp_path / "maps" / f"{photo.name}.html").stat().st_size > 10_000
    exported = run(python, "-c", "import captioner; print(*captioner.__all__)", cwd=tmp_path)
    assert exported.stdout.split() == package.__all__
