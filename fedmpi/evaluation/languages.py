"""Programming languages of the code tasks: how an answer is cleaned, made a program, and run. It must never know a model."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError, EvaluationError
from fedmpi.evaluation.decoding import cut_at
from fedmpi.evaluation.sandbox import INTERPRETER, Step

NBSP = "\u00a0"
FENCE = "```"
COMPILE_S, RUN_S = 60.0, 10.0
LIBRARY_S = 900.0  # Go's library, once: ten seconds where nobody else computes
JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:ReservedCodeCacheSize=64m")
GO_PATH = "/usr/share/gocode"
TESTIFY = "github.com/stretchr/testify/assert"
GO_PACKAGES = (
    *("bytes", "container/heap", "crypto/md5", "encoding/hex", "errors", "fmt", "math", "math/big", "math/bits", "math/cmplx"),
    *("math/rand", "regexp", "sort", "strconv", "strings", "time", "unicode", "unicode/utf8"),
)
BOX_PATH = "/usr/local/bin:/usr/bin:/bin"
GO_TEST = ("go", "test", "-vet=off")
FOREIGN = re.compile(r"#include\s*<((?:boost|openssl)/[^>]+)>")
CPP_HEADERS = (
    *("algorithm", "climits", "cmath", "cstdio", "cstdlib", "cstring"),
    *("iostream", "map", "numeric", "set", "string", "vector"),
)


@dataclass(frozen=True)
class Language:
    """One language. `program` makes files of a problem and a cleaned answer; `done` says how its end is recognised."""

    stops: tuple[str, ...]
    tools: tuple[str, ...]
    package: str  # where Debian has the tools
    clean: Callable[[str], str]
    program: Callable[[Mapping[str, str], str, str], Mapping[str, str]]  # problem, answer, secret -> files
    steps: Callable[[Mapping[str, str]], list[Step]]  # files -> steps
    tells_secret: bool = False  # the program prints the secret when all its tests have passed


def python_clean(text: str) -> str:
    """The first line belongs to the function's body, however far the model indented it."""
    body = text.lstrip("\n")
    first, newline, rest = body.partition("\n")
    return "    " + first.strip() + newline + rest if first.strip() and not first.startswith((" " * 4, "\t")) else body


def close_after(depth: int) -> Callable[[str], str]:
    """A cleaner that ends where so many open braces are closed; braces in strings and comments do not count."""

    def clean(text: str) -> str:
        left = depth
        for place in re.finditer(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*.*?\*/|[{}]', text, re.DOTALL):
            left += {"{": 1, "}": -1}.get(place[0], 0)
            if left == 0:
                return text[: place.end()] + "\n"
        return text + "\n}" * left if depth == 2 and left == 1 else text  # a class may be left open after its method

    return clean


def to_last_brace(text: str) -> str:
    """Whatever follows the last closed block is no code."""
    return text[: text.rfind("}") + 1] + "\n" if "}" in text else text


def _python(problem: Mapping[str, str], answer: str, secret: str) -> Mapping[str, str]:
    check = f"\ncheck({problem['entry_point']})\n" if "entry_point" in problem else "\n"
    return {"program.py": f"{problem['prompt']}{answer}\n{problem['test']}{check}\nprint({secret!r})\n"}


def _cpp(problem: Mapping[str, str], answer: str, secret: str) -> Mapping[str, str]:
    headers = "".join(f"#include <{name}>\n" for name in CPP_HEADERS)
    return {"program.cpp": f"{headers}{problem['prompt']}{answer}\n{problem['test']}\n"}


def _java(problem: Mapping[str, str], answer: str, secret: str) -> Mapping[str, str]:
    return {"Main.java": f"{problem['prompt']}{answer}\n{problem['test']}\n"}


def _go(problem: Mapping[str, str], answer: str, secret: str) -> Mapping[str, str]:
    """The test's own imports, and of the standard library what is used and no more: Go refuses the rest."""
    body = f"{problem['prompt'].replace(problem['import'], '', 1)}{answer}\n"
    setup, test = problem["test_setup"], problem["test"]
    used = [name for name in GO_PACKAGES if re.search(rf"\b{name.rpartition('/')[2]}\.[A-Z]", body + test)]
    imports = "".join(f'import "{name}"\n' for name in used if f'"{name}"' not in setup)
    return {"main_test.go": f"{setup}\n{imports}\n{body}\n{test}\n"}


def _run_go(files: Mapping[str, str]) -> list[Step]:
    """Compiling and running are one step; how long the program itself runs is held by -timeout."""
    library = compiled_go()
    run = [*GO_TEST, "-count=1", f"-timeout={RUN_S:g}s", "main_test.go"]
    return [Step(run, COMPILE_S + RUN_S, 0, _go_env(library), (str(library),))]


def _go_env(library: Path) -> dict[str, str]:
    return {"GOPATH": GO_PATH, "GO111MODULE": "off", "GOCACHE": str(library), "GOFLAGS": "", "CGO_ENABLED": "0"}


@cache
def compiled_go() -> Path:
    """A build cache that holds what programs may import: boxes read it, and compile their own lines only.

    Go keeps it up to date by itself. Root's stands where the user that its boxes run as can read it.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = (Path("/var/cache") if os.geteuid() == 0 else own) / "fedmpi" / "go"
    source = "package main\n" + "".join(f'import _ "{name}"\n' for name in (*GO_PACKAGES, "testing", TESTIFY))
    try:
        for folder in (library.parent, library):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        with tempfile.TemporaryDirectory() as home:
            Path(home, "all_test.go").write_text(source, encoding="utf-8")
            build = [*GO_TEST, "-c", "-o", os.devnull, "all_test.go"]
            env = {"PATH": BOX_PATH, "HOME": home, **_go_env(library)}  # as in a box, or Go would compile it anew there
            told = subprocess.run(
                build, cwd=home, env=env, umask=0o022, timeout=LIBRARY_S, capture_output=True, text=True, check=False
            )
        if told.returncode:
            raise EvaluationError(f"Go cannot compile its library into {library}: {' '.join(told.stderr.split())[:300]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EvaluationError(f"Go cannot compile its library into {library}: {error}") from None
    return library


def _compile_cpp(files: Mapping[str, str]) -> list[Step]:
    libraries = ["-lcrypto"] if "openssl/" in files["program.cpp"] else []
    build = ["g++", "-std=c++17", "-w", "program.cpp", "-o", "program", *libraries]
    return [Step(build, COMPILE_S), Step(["./program"], RUN_S)]


LANGUAGES: Mapping[str, Language] = {
    "python": Language(
        stops=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nassert", FENCE),
        tools=(),
        package="",
        clean=python_clean,
        program=_python,
        steps=lambda files: [Step([INTERPRETER, "-I", "program.py"], RUN_S)],
        tells_secret=True,
    ),
    "cpp": Language(
        stops=("\nint main(", FENCE),
        tools=("g++",),
        package="g++ libboost-dev libssl-dev",
        clean=close_after(1),
        program=_cpp,
        steps=_compile_cpp,
    ),
    "java": Language(
        stops=("\npublic class ", "\nclass Main", FENCE),
        tools=("javac", "java"),
        package="default-jdk-headless",
        clean=close_after(2),
        program=_java,
        steps=lambda files: [
            Step(["javac", *(f"-J{option}" for option in JVM), "Main.java"], COMPILE_S, 0),
            Step(["java", *JVM, "-ea", "-cp", ".", "Main"], RUN_S, 0),
        ],
    ),
    "go": Language(
        stops=("\nfunc main(", "\npackage ", FENCE),
        tools=("go",),
        package="golang-go golang-github-stretchr-testify-dev",
        clean=to_last_brace,
        program=_go,
        steps=_run_go,
    ),
}


def cleaned(language: Language, text: str) -> str:
    """The code of an answer: no typographic spaces, nothing beyond the function."""
    return language.clean(cut_at(text.replace(NBSP, " "), language.stops))


def missing_tools(name: str, problems: list[Mapping[str, Any]]) -> list[str]:
    """Compilers and headers that these problems need and this machine lacks."""
    tools = [tool for tool in LANGUAGES[name].tools if not shutil.which(tool)]
    if name == "cpp" and not tools:
        wanted = {header for problem in problems for header in FOREIGN.findall(problem["prompt"])}
        tools += [header for header in sorted(wanted) if not _has_header(header)]
    if name == "go" and not tools and not os.path.isdir(f"{GO_PATH}/src/{TESTIFY}"):
        tools.append("github.com/stretchr/testify")
    return tools


def _has_header(header: str) -> bool:
    ask = ["g++", "-fsyntax-only", "-x", "c++", "-include", header, "/dev/null"]
    return subprocess.run(ask, capture_output=True, check=False).returncode == 0


def language(name: str) -> Language:
    """A language by its name."""
    if name not in LANGUAGES:
        raise ConfigError(f"--task humaneval-x:{name}: there are {', '.join(f'humaneval-x:{known}' for known in LANGUAGES)}")
    return LANGUAGES[name]
