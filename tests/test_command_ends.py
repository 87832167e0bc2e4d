"""How a command ends when streams are closed, disks are full, paths cannot be used and users press Ctrl-C.

`evaluate ... 2>&1 | true` used to evaluate nothing and to blame the model; a full disk, a directory of another user and
Ctrl-C ended in tracebacks of up to 66 lines; a minus sign killed a command in an ASCII terminal after its work was
done; and control characters of a text went to the terminal as they were.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import pty
import signal
import string
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from quietstar.errors import escape_controls
from quietstar.evaluate import main as evaluate
from quietstar.model.loading import character_tokenizer
from quietstar.train import main as train
from tests.marks import slow
from tests.model.tiny import make_model

SYMBOLS = string.ascii_lowercase + string.digits + " .\n"
LIBC = ctypes.CDLL(None)
COMMAND = "from quietstar.errors import *; import sys, os, json, time, signal; from pathlib import Path\n"
END = "\nsys.exit(run_command(command))"


def run(body: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with a body of one's own; `shell` is what follows it, such as a redirection."""
    script = f"{COMMAND}def command():\n    {body}{END}"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, script],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def command(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -m "$@" {shell}', sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def as_ordinary(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user whom permissions hold: root without the capabilities to pass over them."""

    def drop() -> None:
        if os.getuid() == 0:
            for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
                assert LIBC.prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP

    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=directory, preexec_fn=drop
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(changes={"eos_token_id": len(SYMBOLS)}, thought_length=3).save_pretrained(directory)
    character_tokenizer(SYMBOLS, "</s>").save_pretrained(directory)
    (directory / "text.txt").write_text("the sum of 3 and 4 is seven. " * 20)
    return directory


# -- streams -----------------------------------------------------------------------------------------------------------

LINES = "[print('line', n, flush=True) or time.sleep(0.002) for n in range(200)]; Path(os.environ['DONE']).touch()"


@pytest.mark.parametrize(
    ("shell", "status", "finished"),
    [
        ("| head -1; exit ${PIPESTATUS[0]}", 141, False),
        ("| true; exit ${PIPESTATUS[0]}", 141, False),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", 141, False),
        ("> /dev/full", 2, False),
        (">&-", 0, True),
        ("2>&-", 0, True),
        (">&- 2>&-", 0, True),
        ("<&- >&- 2>&-", 0, True),
        ("> /dev/null", 0, True),
        ("2> /dev/full", 0, True),
    ],
)
def test_stdout_without_a_reader_ends_a_command_quietly(
    shell: str, status: int, finished: bool, tmp_path: Path
) -> None:
    done = run(LINES, shell, DONE=str(tmp_path / "done"))
    assert done.returncode == status, done.stderr
    assert (tmp_path / "done").exists() == finished
    wanted = "error: standard output: No space left on device; " if status == 2 else ""
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == (status == 2), done.stderr


@pytest.mark.parametrize("stderr", ["2> >(true)", "2>&-", "2> /dev/full", "2> /dev/null", "2>&1 >/dev/null | true"])
def test_what_nobody_takes_of_stderr_stops_nothing(stderr: str, tmp_path: Path) -> None:
    """Bars, warnings and logs of libraries among it."""
    body = (
        "import logging, warnings, tqdm; time.sleep(0.2); "
        "[logging.error('x') or warnings.warn(str(n)) for n in range(9)];"
        " list(tqdm.tqdm(range(9), mininterval=0)); print('x', file=sys.stderr, flush=True)"
        "; Path(os.environ['DONE']).write_text('done')"
    )
    run(body, stderr, DONE=str(tmp_path / "done"))
    assert (tmp_path / "done").read_text() == "done"


def test_a_closed_descriptor_does_not_send_messages_into_a_file(tmp_path: Path) -> None:
    """The next file that a process opens gets the lowest free number: that of stderr."""
    body = "file = open(os.environ['FILE'], 'w'); os.write(2, b'message'); file.write('content'); file.close()"
    assert run(body, "<&- >&- 2>&-", FILE=str(tmp_path / "file")).returncode == 0
    assert (tmp_path / "file").read_text() == "content"


TEXTS = ["a \u2212 b", "caf\xe9 \u2713", "\U0001f600", "\udcff", "plain", "\u4e2d\u6587"]
ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "utf-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_no_text_is_too_much_for_an_output(environment: dict[str, str]) -> None:
    body = f"[print(text) or print(text, file=sys.stderr) for text in {TEXTS!a}]; print('end')"
    script = f"{COMMAND}def command():\n    {body}{END}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | environment)
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    wanted = [text.encode(encoding, "backslashreplace") for text in TEXTS]
    assert done.returncode == 0
    assert done.stdout.split(b"\n") == [*wanted, b"end", b""]
    assert done.stderr.split(b"\n") == [*wanted, b""]


def test_what_could_control_a_terminal_is_shown_and_nothing_else_is() -> None:
    """Compared with Unicode's own classes: controls, bidirectional formats, separators of lines."""
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(0x3000):
        character = chr(code)
        controls = unicodedata.category(character) in ("Cc", "Zl", "Zp") and character not in "\n\t"
        turns = unicodedata.bidirectional(character) in bidirectional or character in "\u061c\u200e\u200f"
        wanted = f"\\u{code:04x}" if controls or turns else character
        assert (
            escape_controls(character).replace("\\r", "\\u000d").replace("\\b", "\\u0008").replace("\\f", "\\u000c")
            == wanted
        )
    line = json.dumps({"a": "\x1b[31m\x7f\x9b\u202e\r\U000e0041 caf\xe9"}, ensure_ascii=False)
    assert json.loads(escape_controls(line)) == json.loads(line) and escape_controls(line).replace("\xe9", "").isascii()


HOSTILE = ["\x1b[2J", "\x07", "\x9b31m", "\u202eabc", "\x7f", "a\rb", "\x08\x08", "\u2066x"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_control_characters_are_escaped_on_a_terminal_and_unchanged_in_a_pipe(text: str) -> None:
    script = f"{COMMAND}def command():\n    print({text!r})\n    raise DataError({text!r}){END}"
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert piped.stdout.decode() == f"{text}\n"
    assert piped.stderr.decode() == f"error: {escape_controls(text)}\n" and escape_controls(text) != text
    main, other = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stdout=other, stderr=other, env=os.environ | {"PYTHONUTF8": "1"})
    os.close(other)
    said = os.read(main, 1000).decode()
    os.close(main)
    assert said == f"{escape_controls(text)}\r\nerror: {escape_controls(text)}\r\n"


def test_a_bar_still_draws_over_itself() -> None:
    body = "import tqdm; list(tqdm.tqdm(range(3), desc='\\x1b[2Jname', mininterval=0))"
    script = f"{COMMAND}def command():\n    {body}{END}"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True).stderr.decode()
    assert said.count("\r") >= 2 and "\x1b" not in said and "\\u001b[2Jname" in said


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

WAITS = {
    "python": "time.sleep(60)",
    "an import that fails by it": """
    try: time.sleep(60)
    except KeyboardInterrupt: raise ImportError('x')""",
    "a library that blames something": """
    try: time.sleep(60)
    except BaseException as error: raise ConfigError('the model cannot be loaded') from error""",
    "a callback, whose errors are only printed": """
    class Late:
        def __del__(self): time.sleep(0.6)
    late = Late(); del late; time.sleep(60)""",
    "cleaning up": """
    try: time.sleep(60)
    finally: Path(os.environ['DONE']).touch()""",
}


@pytest.mark.parametrize("wait", WAITS)
def test_an_interruption_is_one_line_and_status_130(wait: str, tmp_path: Path) -> None:
    script = f"{COMMAND}def command():\n    print('ready', flush=True)\n    {WAITS[wait].strip()}{END}"
    environment = os.environ | {"DONE": str(tmp_path / "done")}
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "interrupted; what is finished is kept\n")
    assert (tmp_path / "done").exists() == (wait == "cleaning up")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "generate", "gate", "view", "rank", "plan", "train", "star", "sweep"])
@pytest.mark.parametrize("after", [0.4, 2.0])
def test_every_command_can_be_interrupted_from_its_first_import_on(
    name: str, after: float, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "candidates.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"]}\n' * 400)
    text = ["--text", str(model / "text.txt"), "--device", "cpu"]
    arguments = {
        "evaluate": [str(model), *text, "--length", "24"],
        "generate": [str(model), "--prompt", "abc", "--max_new_tokens", "100000", "--device", "cpu"],
        "gate": [str(model), *text, "--out", "gated", "--length", "24"],
        "view": [str(model), *text],
        "rank": ["--candidates", "candidates.jsonl", "--verifier", str(model), "--device", "cpu"],
    }.get(name, [])
    code = (
        "import signal, runpy; signal.signal(2, signal.default_int_handler); "
        f"runpy.run_module('quietstar.{name}', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    time.sleep(after)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and len(said.splitlines()) <= 3, said


# -- what the system refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EMFILE", "EACCES", "ENAMETOOLONG", "ETXTBSY"])
def test_what_the_system_refuses_is_one_line_with_the_file(code: str) -> None:
    number = getattr(errno, code)
    named = run(f"raise OSError({number}, os.strerror({number}), 'a/file')")
    assert named.returncode == 2 and named.stderr.startswith(f"error: a/file: {os.strerror(number)}; ")
    assert named.stderr.count("\n") == 1 and named.stderr.endswith("; what is finished is kept\n")
    by_write = run(f"with naming(Path('a/file')): raise OSError({number}, os.strerror({number}))")
    in_rust = run(f"with naming('a/file'): raise Exception('Error while x: y (os error {number})')")
    assert named.stderr == by_write.stderr == in_rust.stderr


@pytest.mark.parametrize("error", ["ZeroDivisionError", "RuntimeError('x')", "KeyError('os error 28')", "TypeError"])
def test_any_other_error_keeps_its_traceback(error: str) -> None:
    done = run(f"raise {error}")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("limit", [200, 2_000, 20_000])
def test_an_evaluation_without_room_is_one_line_and_continues(
    limit: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluation_items.jsonl` ended in a traceback that named no file."""
    words = [str(model), "--text", str(model / "text.txt"), "--text_tokens", "40", "--length", "20", "--device", "cpu"]
    words += ["--output_dir", str(tmp_path / "found")]
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        status = 99
        try:
            with capsys.disabled():
                reader, writer = os.pipe2(os.O_NONBLOCK)
                os.dup2(writer, 2)
                sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
                status = evaluate(words)
                said = os.read(reader, 10_000).decode()
                last = said.splitlines()[-1]
                if not (last.startswith(f"error: {tmp_path}") and "File too large" in last and "Traceback" not in said):
                    status = 98
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert not [file for file in (tmp_path / "found").iterdir() if file.suffix == ".new"]
    assert evaluate(words) == 0
    assert json.loads((tmp_path / "found" / "evaluation.json").read_text())


# -- paths -------------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "closed/x.txt": "(Permission denied)",
    "unreadable.txt": "(Permission denied)",
    "loop.txt": "(Too many levels of symbolic links)",
    "x" * 300 + ".txt": "(File name too long)",
    "/".join(["x" * 200] * 30): "(File name too long)",
    "/dev/zero": "is a device, a pipe or a socket",
    "unreadable": "(Permission denied)",
}
READERS = {
    "view --text": ["quietstar.view", "a/b", "--text"],
    "evaluate --text": ["quietstar.evaluate", "a/b", "--output_dir", "out", "--text"],
    "evaluate --data": ["quietstar.evaluate", "a/b", "--output_dir", "out", "--tasks", "gsm8k", "--data"],
    "gate --text": ["quietstar.gate", "a/b", "--out", "gated", "--text"],
    "train --data.path": ["quietstar.train", "--model.path", "a/b", "--data.path"],
    "train --model.path": ["quietstar.train", "--data.path", "text.txt", "--model.path"],
    "star --problems.path": ["quietstar.star", "--task", "gsm8k", "--model.path", "a/b", "--problems.path"],
    "generate --prompts": ["quietstar.generate", "a/b", "--prompts"],
    "generate CHECKPOINT": ["quietstar.generate", "--prompt", "x", "--checkpoint"],
    "rank --candidates": ["quietstar.rank", "--verifier", "a/b", "--candidates"],
    "report": ["quietstar.report", "--run_directory"],
    "plan --config": ["quietstar.plan", "--config"],
}


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("A text.\n")
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed" / "x.txt").write_text("text")
    for name in ("closed", "unreadable.txt", "unreadable"):
        if name == "unreadable":
            (tmp_path / name).mkdir()
        elif name != "closed":
            (tmp_path / name).write_text("text")
        (tmp_path / name).chmod(0)
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
def test_a_path_that_cannot_be_used_is_named_with_its_option_and_reason(reader: str, forbidden: Path) -> None:
    """As an ordinary user; PermissionError and ENAMETOOLONG came out of `is_dir` as tracebacks."""
    option = READERS[reader][-1].removeprefix("--")
    for path, reason in FORBIDDEN.items():
        done = as_ordinary([*READERS[reader], path], forbidden)
        if option in ("model.path", "checkpoint") and path in ("unreadable.txt", "/dev/zero"):
            reason = "is not a directory"
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: {option}: ") and reason in done.stderr, (path, done.stderr)
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["data.path", "problems.path"])
def test_a_pipe_is_refused_where_it_would_be_read_again(option: str, forbidden: Path) -> None:
    """It would wait for ever."""
    reader = next(words for words in READERS.values() if words[-1] == f"--{option}")
    done = as_ordinary([*reader, "pipe.txt"], forbidden)
    assert done.returncode == 2 and f"{option}: pipe.txt is a device, a pipe or a socket" in done.stderr


def test_a_pipe_is_read_where_it_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "c").write_text('{"prompt": "a", "completions": ["b", "c"], "answers": ["1", "1"]}\n')
    done = command("quietstar.rank", "--by", "majority", "--candidates", shell=f"<(cat {tmp_path / 'c'})")
    assert done.returncode == 0 and json.loads(done.stdout)["ranked"][0]["votes"] == 2


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "model.safetensors").chmod(0)
    done = as_ordinary(["quietstar.generate", "copy", "--prompt", "abc", "--device", "cpu"], tmp_path)
    assert done.returncode == 2
    assert "checkpoint: cannot read copy/model.safetensors (Permission denied)" in done.stderr


@pytest.mark.parametrize("name", [b"\xff", b"caf\xe9", b"a\xc0\xafb", b"\xed\xa0\x80", b"x\x80"])
def test_a_path_that_is_not_utf_8_is_refused_for_models_and_outputs(name: bytes, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(name)).mkdir()
    for words in (["quietstar.generate", "--prompt", "x", os.fsdecode(name)], ["quietstar.gate", "a/b", "--text", "t"]):
        extra = ["--out", os.fsdecode(name)] if "quietstar.gate" in words else []
        done = as_ordinary([*words, *extra], tmp_path)
        assert done.returncode == 2 and "is not UTF-8 text" in done.stderr, done.stderr
        assert os.fsdecode(name).encode("utf-8", "backslashreplace").decode() in done.stderr


def test_nul_is_refused_in_any_option(tmp_path: Path) -> None:
    for key in ("model.path", "data.path", "output_dir", "model.start_text", "data.field"):
        (tmp_path / "c.yaml").write_text(f'{key}: "a\\0b"\n')
        done = command("quietstar.train", "--config", str(tmp_path / "c.yaml"))
        assert done.returncode == 2 and "c.yaml:1: not valid YAML: a text with a NUL character" in done.stderr


@pytest.mark.parametrize("device", ["stdout", "fd/1", "pipe"])
def test_an_output_that_is_no_file_is_written_to_and_not_replaced(device: str, tmp_path: Path) -> None:
    """As root, `--json /dev/full` replaced the device by a file."""
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "pipe" if device == "pipe" else f"/dev/{device}"
    body = f"from quietstar.runs.files import write_whole; write_whole(Path('{path}'), 'text')"
    reader = f"& cat {path}; wait $!" if device == "pipe" else "| cat"
    assert run(body, reader).stdout == "text"
    assert not Path(path).is_file() or device != "pipe"


# -- modes of files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, slow(0o027), slow(0o002)])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_file_of_a_run_follows_the_umask(umask: int, adapters: bool, model: Path, tmp_path: Path) -> None:
    """safetensors made model.safetensors private, so that colleagues could not read a shared run."""
    out = tmp_path / "run"
    words = [
        *("--model.path", str(model), "--data.path", str(model / "text.txt"), "--output_dir", str(out)),
        *("--training.steps", "2", "--training.batch_size", "2", "--data.length", "16", "--training.device", "cpu"),
        *("--model.thought_length", "2", "--training.save_every", "1", "--training.eval_every", "1"),
        *("--model.start_text", "a", "--model.end_text", "b", "--training.keep_best", "true"),
        *(["--finetuning.lora_rank", "2"] if adapters else []),
    ]
    before = os.umask(umask)
    try:
        assert train(words) == 0
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.safetensors", ".lock", "report.html"} - {
        "model.safetensors" if adapters else ""
    } <= {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}
    assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*") if path.is_dir()} == {oct(0o777 & ~umask)}
