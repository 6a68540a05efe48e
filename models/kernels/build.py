"""The C sources, compiled once for this processor by the user's own C compiler; the libraries are kept.

Decoding's part takes about five seconds, training's two or three; each is built when it is first needed,
which is said on stderr. It needs a C compiler with OpenMP (gcc or clang; `CC` names another). Without one,
everything runs on torch's kernels. `NESTLING_NATIVE=0` asks for that.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from models.base.errors import NestlingError, UsageError
from models.base.files import default_cache_dir, write_file
from models.base.processor import one_thread_after_fork, processor_name

HERE = Path(__file__).parent
SOURCES = {"decode_step": ("nestling_step", "decoding"), "train_ops": ("nestling_norm", "training")}
"""The sources, decode_step.c and train_ops.c: a function of each, and who calls them."""
# Sums keep their order and small numbers their value: nothing here may be called fast-math.
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-strict-aliasing"),
    # By default gcc stores 256-bit halves on Intel, and a 512-bit load of both must wait for them.
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
BUILD_SECONDS = 600  # a slow machine that is busy, too: whoever waits is told for what
APPLE_HINT = "Apple's clang has no OpenMP: run `brew install gcc` and set CC=gcc-15, or what it installed"
SWITCH = "NESTLING_NATIVE"

_log = logging.getLogger(__name__)


@functools.cache
def library(name: str = "decode_step") -> ctypes.CDLL | None:
    """Return the library of a source; None where it is switched off or cannot be built (logged)."""
    switch = os.environ.get(SWITCH) or "1"
    if switch not in ("0", "1"):
        raise UsageError(f"{SWITCH}={switch} is neither 0 (torch's kernels) nor 1; set one of them")
    if switch == "0":
        return None
    try:
        path = build(name)
        one_thread_after_fork()
        try:
            return load(path, name)
        except NestlingError:  # damaged: it is made again, once
            path.unlink(missing_ok=True)
            return load(build(name), name)
    except (NestlingError, OSError) as error:
        _log.warning("%s runs on torch's kernels: %s", SOURCES[name][1], error)
        return None


def build(name: str = "decode_step", *, cache_dir: Path | None = None) -> Path:
    """Return the path of the library for this processor, compiled if there is none yet.

    Args:
        name: the source, a key of `SOURCES`.
        cache_dir: the folder for libraries; `default_cache_dir()` if None.

    Raises:
        NestlingError: if no compiler works, or the library cannot be stored.
    """
    compiler = compiler_words()
    if shutil.which(compiler[0]) is None:
        raise NestlingError(f"there is no C compiler {compiler[0]!r}; install gcc or name another by CC")
    source = HERE / f"{name}.c"
    parts = (
        *(path.read_text() for path in (*sorted(HERE.glob("*.h")), source)),
        *compiler,
        *FLAGS,
        *map(str, processor_name()),
    )
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = (cache_dir or default_cache_dir()) / f"{name}-{key}.so"
    if runs_nothing(path.parent):  # it would be compiled at every start, for nothing
        raise NestlingError(
            f"{path.parent} is on a file system mounted noexec; set XDG_CACHE_HOME to a folder on another"
        )
    if path.exists():
        return path
    sys.stderr.write(f"compiling for this processor, once ({SOURCES[name][1]}) ...\n")
    try:
        with write_file(path) as partial:
            _compile([*compiler, *FLAGS, str(source), "-o", str(partial), "-lm"])
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["it says nothing"]
        reason = APPLE_HINT if sys.platform == "darwin" and "-fopenmp" in error.stderr else lines[0]
        raise NestlingError(f"{shlex.join(compiler)} cannot compile {source}: {reason}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NestlingError(f"{path}: {error}") from None
    return path


def _compile(command: list[str]) -> None:
    """Run a compiler; it ends with us, whatever ends us."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=BUILD_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the driver alone would leave the compiler proper at work
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def compiler_words() -> list[str]:
    """Return the compiler's name and what goes with it, as `CC` says; `cc` where it is unset or blank.

    Raises:
        NestlingError: if its quotes do not match.
    """
    value = os.environ.get("CC", "")
    try:
        return shlex.split(value) or ["cc"]
    except ValueError as error:
        raise NestlingError(f"CC={value!r} cannot be read ({error}); set it to a C compiler's name") from None


def runs_nothing(folder: Path) -> bool:
    """Return True if a folder, made or yet to be made, lies on a file system that is mounted noexec."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return bool(os.statvfs(place).f_flag & getattr(os, "ST_NOEXEC", 0))


def load(path: Path, name: str = "decode_step") -> ctypes.CDLL:
    """Open a library that `build` gave.

    Raises:
        NestlingError: if the system cannot load it.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        getattr(loaded, SOURCES[name][0]).restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise NestlingError(f"{path} cannot be loaded ({error}); remove it") from None
    return loaded


def kernels_name() -> str:
    """Name what a pass of decoding runs on: compiled code and its instruction set, or torch's kernels."""
    loaded = library()
    if loaded is None:
        return "torch's kernels"
    return f"compiled for {(ctypes.c_char * 32).in_dll(loaded, 'nestling_instructions').value.decode()}"
