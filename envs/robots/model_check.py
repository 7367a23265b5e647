"""Checks of an MJCF file from a stranger before MuJoCo reads it in this process.

First the text is scanned: which files it names, and where they are. Then a child process with
limits on time and memory reads and compiles it (``model_trial.py``), because a file of a hundred
bytes can make MuJoCo hang, crash, or take all memory.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from metarobot.bridge.tools.python_command import child_environment, python_script
from metarobot.tasks.model_edits import ModelError

FOLDERS_VARIABLE = "METAROBOT_MODEL_FOLDERS"
"""Environment variable: further folders that models may take files from, separated by colons."""

MAX_XML_BYTES = 16 << 20
MAX_FILE_BYTES = 256 << 20
"""Of a mesh, a texture or a height field."""
MAX_TOTAL_BYTES = 1 << 30
MAX_FILES = 2000
MAX_DEPTH = 100
"""Elements within elements; MuJoCo itself stops at 500."""
TRIAL_WALL_S = 120.0
"""A child that takes longer is ended; its own limit on CPU time comes first, usually."""
MAX_SIZES = {
    "nbody": 2_000,
    "ngeom": 20_000,
    "nv": 1_000,
    "nsite": 20_000,
    "nsensordata": 100_000,
    "nmeshvert": 20_000_000,
    "nmeshface": 40_000_000,
    "nhfielddata": 20_000_000,
    "ntexdata": 1 << 29,
    "nflexvert": 100_000,
    "nbuffer": 2 << 30,
    "narena": 2 << 30,
}
"""Field of ``MjModel`` -> the most that a robot may have of it."""

_DIRECTORY_ATTRIBUTES = ("assetdir", "meshdir", "texturedir")
_XML_ELEMENTS = ("include", "model")
"""Elements that name a file which is MJCF in turn."""
_REFUSED_ELEMENTS = ("extension", "plugin")


@dataclass
class _Scan:
    """What a model file and the files it includes say about other files."""

    folder: Path
    """Folder of the model file, without symbolic links."""
    folders: list[Path]
    """Folders that files may be in."""
    directories: set[str] = field(default_factory=lambda: {""})
    """Values of ``meshdir`` and the like."""
    references: list[tuple[Path, str, str]] = field(default_factory=list)
    """Folder of the file that names it, element, and the name of a file."""
    files: dict[Path, os.stat_result] = field(default_factory=dict)
    """Files that the model consists of."""


def check_model_file(path: Path) -> tuple[object, ...]:
    """Check which files a model file names, and return what identifies their content.

    Raises:
        ModelError: It is no plain MJCF, is too large, names files out of its folder, or plugins.
    """
    folder = path.parent.resolve()
    allowed = [
        Path(entry).resolve()
        for entry in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
        if entry
    ]
    scan = _Scan(folder, [folder, *allowed])
    _add_file(scan, path, MAX_XML_BYTES)
    _scan_xml(scan, path)

    # A directory may be declared after it is used, and in another file: every name is tried in all
    done = 0
    while done < len(scan.references):
        base, element, name = scan.references[done]
        done += 1
        for candidate in _candidates(scan, base, name):
            is_xml = element in _XML_ELEMENTS
            is_new = _add_file(scan, candidate, MAX_XML_BYTES if is_xml else MAX_FILE_BYTES, name)
            if is_new and is_xml:
                directories = len(scan.directories)
                _scan_xml(scan, candidate)
                if len(scan.directories) > directories:
                    done = 0
    return tuple(
        (str(file), info.st_ino, info.st_size, info.st_mtime_ns)
        for file, info in scan.files.items()
    )


def _candidates(scan: _Scan, base: Path, name: str) -> list[Path]:
    """Return the existing paths that MuJoCo could mean by the name of a file."""
    candidates = {
        Path(os.path.realpath(start / directory / form))
        for start in (scan.folder, base)
        for directory in scan.directories
        for form in (name, Path(name).name)  # the compiler's strippath leaves the last part
    }
    return sorted(c for c in candidates if os.path.lexists(c) and not c.is_dir())


def _add_file(scan: _Scan, path: Path, max_bytes: int, name: str = "") -> bool:
    """Check a file and note it; return whether it is new.

    Raises:
        ModelError: It is outside the folders, no regular file, or too large.
    """
    real = Path(os.path.realpath(path))
    if real in scan.files:
        return False
    if not any(real.is_relative_to(folder) for folder in scan.folders):
        what = f"file {name!r}" if name else f"link to {real}"
        raise ModelError(
            f"its {what} is outside its folder {scan.folder}; "
            f"{FOLDERS_VARIABLE}=FOLDER allows a further folder"
        )
    try:
        info = real.stat()
    except OSError as e:
        raise ModelError(f"its file {name!r} cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"its file {name or path.name!r} is no regular file")
    if info.st_size > max_bytes:
        raise ModelError(
            f"its file {name or path.name!r} has {info.st_size} bytes, more than {max_bytes}"
        )
    scan.files[real] = info
    if len(scan.files) > MAX_FILES:
        raise ModelError(f"it consists of more than {MAX_FILES} files")
    if sum(i.st_size for i in scan.files.values()) > MAX_TOTAL_BYTES:
        raise ModelError(f"its files have more than {MAX_TOTAL_BYTES} bytes together")
    return True


def _scan_xml(scan: _Scan, path: Path) -> None:
    """Note the files and directories that an MJCF file names.

    Expat is stricter than MuJoCo's own reader: what it accepts, both read in the same way, as long
    as there are no entities.

    Raises:
        ModelError: It is no plain XML, too deep, or names a plugin or a file in an odd way.
    """
    depth = 0

    def start(element: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ModelError(f"its elements are nested more than {MAX_DEPTH} deep")
        if element in _REFUSED_ELEMENTS:
            raise ModelError(f"it has the element {element!r}: plugins are not loaded")
        for key, value in attributes.items():
            if element == "compiler" and key in _DIRECTORY_ATTRIBUTES:
                scan.directories.add(_checked_name(value))
            elif key.startswith("file") and value:
                scan.references.append((path.parent, element, _checked_name(value)))

    def end(element: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse_doctype(*_: object) -> None:
        raise ModelError("it has a document type declaration, and with it perhaps entities")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse_doctype
    try:
        parser.Parse(path.read_bytes().decode(), True)
    except (expat.ExpatError, UnicodeDecodeError) as e:
        raise ModelError(f"{path.name} is no XML: {e}") from e
    except OSError as e:
        raise ModelError(f"{path.name} cannot be read: {e.strerror}") from e


def _checked_name(name: str) -> str:
    """Return the name of a file or directory.

    Raises:
        ModelError: It is no plain path.
    """
    if len(name) > 1000 or not name.isprintable() or ":" in name or "\\" in name:
        raise ModelError(f"the name of a file is no plain path: {name[:100]!r}")
    return name


_tried: set[tuple[object, ...]] = set()
"""What identifies models that compiled in a child of this process."""


def try_model(path: Path, identity: tuple[object, ...]) -> None:
    """Read and compile a model file in a child process with limits on time and memory.

    Args:
        path: The model file.
        identity: What identifies its content; a model is tried once.

    Raises:
        ModelError: It does not compile within the limits, or is larger than ``MAX_SIZES``.
    """
    if identity in _tried:
        return
    sizes = _sizes_in_child(path)
    for name, most in MAX_SIZES.items():
        if sizes[name] > most:
            raise ModelError(f"it is too large: {name} is {sizes[name]}, the most is {most}")
    _tried.add(identity)


def _sizes_in_child(path: Path) -> dict[str, int]:
    """Return the sizes of the model as a child process compiled it.

    Raises:
        ModelError: The child failed; the message of MuJoCo, or how the child ended.
    """
    command = [*python_script(Path(__file__).with_name("model_trial.py")), str(path.resolve())]
    # MuJoCo writes a log into its working folder
    with tempfile.TemporaryDirectory() as scratch:
        try:
            child = subprocess.run(  # noqa: S603
                command,
                cwd=scratch,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TRIAL_WALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise ModelError(f"MuJoCo takes more than {TRIAL_WALL_S:g} s to read it") from e
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ModelError("MuJoCo takes too much time or memory to read it")
    answer: Any = None
    try:
        answer = json.loads(child.stdout.decode(errors="replace").splitlines()[-1])
    except (ValueError, IndexError):
        end = f"signal {-child.returncode}" if child.returncode < 0 else f"code {child.returncode}"
        raise ModelError(f"MuJoCo ends with {end} when it reads it") from None
    if "error" in answer:
        raise ModelError(answer["error"])
    if b"contains a 'NaN'" in child.stderr:
        raise ModelError("its numbers include NaN")
    sizes: dict[str, int] = answer["sizes"]
    return sizes
