"""Programs that attack the process of their tests, the directory, or the machine: they fail, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from quietstar.tasks import code as code_task
from quietstar.tasks.code import run_tests

TEST = "assert f(1) == 2\nassert f(41) == 42"
SWALLOWS = "try:\n    f(1)\n    raised = False\nexcept BaseException:\n    raised = True\nassert raised"
PIPE = """
import gc, os, time
pipe = next(one for one in gc.get_objects() if type(one).__name__ == "_Program")._pipe
def raw(line, times=1):
    for _ in range(times):
        pipe._writes.write(line)
    pipe._writes.flush()
"""


def forge(value: str) -> str:
    """A program that sends a message of its own making in place of its names."""
    return f"{PIPE}raw(b'{{\"names\": {{\"f\": ' + {value} + b'}}}}\\n')\n"


ATTACKS = {
    "deep reply": forge("b'[' * 10**6"),
    "deep value": forge("b'[\"list\",[' * 10**5 + b']]' * 10**5"),
    "400 MiB in one line": PIPE + "raw(b'x' * 2**20, 400)",
    "400 MiB in many lines": PIPE + "raw(b'{\"names\": {}}\\n' * 2**16, 400)",
    "32 million numbers": forge("b'[' + b'0,' * 2**25 + b'0]'"),
    "a million digits": forge("b'9' * 10**6"),
    "a long list of a short text": forge('b\'["dict_keys", ["range", ["tuple", [0, 1000000000000, 1]]]]\''),
    "no message": PIPE + "raw(b'3\\n')",
    "names that are a list": PIPE + 'raw(b\'{"names": ["f"]}\\n\')',
    "a verdict as its failure": PIPE + 'raw(b\'{"failure": {"passed": true}}\\n\')',
    "a class that is no error": forge('b\'["class", [], "type"]\''),
    "an error with an odd name": forge('b\'["error", ["class", [[0, "\\u0000"]], "Exception"], ["tuple", []], 0]\''),
    "a known object that is not there": forge("b'[\"known\", -1]'"),
    "a function of the tests that is not there": PIPE
    + 'def f(x):\n    raw(b\'{"callback": -1, "arguments": ["tuple", []], "named": ["dict", []]}\\n\')',
    "other json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x): return 0",
    "no json": "import json\ndel json.dumps, json.loads\ndef f(x): return 0",
    "another encoder": "import sys\nsys.modules['__main__'].Codec.encode = lambda *a: True\ndef f(x): return 0",
    "a trace": "import sys\nsys.settrace(lambda *a: sys.exit(0))\nsys.setprofile(print)\ndef f(x): return 0",
    "builtins": "__builtins__.__build_class__ = __builtins__.len = __builtins__.next = None\ndef f(x): return 0",
    "at fork": "import os\nos.register_at_fork(before=print, after_in_parent=print)\ndef f(x): return 0",
    "not a number": "def f(x): return float('nan')",
    "a number that is anything": "class N(int):\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n"
    "    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return N(7)",
    "a float that is anything": "class N(float):\n    __eq__ = lambda s, o: True\ndef f(x): return N(7)",
    "a text that is anything": "class N(str):\n    __eq__ = lambda s, o: True\n    __bool__ = lambda s: True\n"
    "def f(x): return N(7)",
    "a dict that is anything": "class N(dict):\n    __eq__ = lambda s, o: True\ndef f(x): return N()",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
    "threads with a small stack": "import threading, time\nthreading.stack_size(2**15)\n"
    "while True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
    "interrupts": "import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
    "a pipe that is shut": "import os\nos.closerange(0, 64)\ndef f(x): return x + 1",
    "a pipe in place of the pipe": "import os\nfor n in range(3, 32):\n    os.dup2(0, n)\ndef f(x): return x + 1",
    "long error": "def f(x): raise ValueError('x' * 2**27)",
    "an error that cannot be told": "class E(Exception):\n    __str__ = __repr__ = lambda s: 1 / 0\n"
    "    args = property(lambda s: 1 / 0)\ndef f(x): raise E",
    "a list that is nested for ever": "def f(x):\n    while True: x = [x]",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_the_tests_fails_in_time(name: str) -> None:
    began = time.monotonic()
    run = run_tests(ATTACKS[name], TEST, timeout=4)
    assert not run.passed and run.failure is not None and len(run.failure) < 400
    assert time.monotonic() - began < 20  # two cores may be busy


@pytest.mark.parametrize(
    "last",
    [
        "os._exit(0)",
        "os.close(4), os.close(3), os.closerange(0, 64)",
        "raw(b'[' * 10**6 + b'\\n')",
        "raw(b'3\\n')",
        "raw(b'{}\\n')",
        'raw(b\'{"value": ["no", 1], "changed": []}\\n\')',
        "raw(b'{\"value\": 1}\\n')",
        "raw(b'x' * 2**27)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
@pytest.mark.parametrize("tests", [SWALLOWS, "import contextlib\nwith contextlib.suppress(BaseException):\n    f(1)"])
def test_tests_that_expect_an_error_do_not_take_the_end_of_the_program_for_one(last: str, tests: str) -> None:
    """A program that exited in a call passed where the test caught what it raised, which was the lost pipe's error."""
    run = run_tests(f"{PIPE}def f(x):\n    {last}\n", tests, timeout=10)
    assert not run.passed
    assert run_tests("def f(x): raise ValueError", tests, timeout=10).passed


@pytest.mark.parametrize("module", ["antigravity", "ensurepip.__main__", "this", "os", "subprocess", "idlelib.idle"])
def test_a_program_does_not_choose_what_the_tests_import(module: str) -> None:
    """`antigravity` opened a browser from the process of the tests, which was not sealed, and `ensurepip` installed."""
    run = run_tests(forge(f'b\'["module", "{module}"]\''), "f", timeout=10)
    assert run.failure == "ValueError: not a value"


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("import math as m\ndef f(x): return m", "assert f(1).floor(2.5) == 2 and m.pi > 3"),
        ("import os.path as p", "assert p.basename('a/b') == 'b'"),
        ("import heapq as h", "a = [3, 1]\nh.heapify(a)\nassert a == [1, 3]"),
        ("import string as s", "assert s.digits == '0123456789'"),
        ("import textwrap as t", "assert t.dedent('  a') == 'a'"),
    ],
)
def test_modules_of_a_program_can_be_used_by_its_tests(code: str, tests: str) -> None:
    run = run_tests(code, tests, timeout=10)
    assert run.passed, run.failure


@pytest.mark.parametrize(
    "fill",
    [
        "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nfor n in range(3000):\n    os.makedirs(f'{n}/a')",
        "import os\nos.mkdir('closed', 0o300)",
        "import os\nos.mkdir('closed', 0)",
        "for n in range(2000):\n    open(str(n), 'w').close()",
        "open('a\\nb\\xff', 'w').close()\nopen('-rf', 'w').close()",
    ],
)
def test_whatever_a_program_makes_is_removed(fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested deeply enough, directories once ended the check in a RecursionError, and stayed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_tests(fill + "\ndef f(x): return 0", "assert f(1) == 2", timeout=10)
    assert os.listdir(tmp_path) == []


def test_a_program_may_start_threads_whoever_runs_it() -> None:
    """The limit of processes is one of threads too, and was 1: only root's programs had threads."""
    code = "import resource\ndef f(x): return resource.getrlimit(resource.RLIMIT_NPROC)[0]"
    tasks = len([one for one in Path("/proc").glob("[0-9]*/task/*") if one.exists()])
    run = run_tests(code, f"assert f(1) > {tasks}, f(1)", timeout=10)
    assert run.passed, run.failure


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("sorted(set(os.environ) - {'HOME', 'TMPDIR', 'PATH', 'LC_CTYPE'})", []),
        ("os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()", True),
        ("os.listdir()", []),
        ("[name for name in ('numpy', 'quietstar', 'torch', 'yaml') if importlib.util.find_spec(name)]", []),
        ("[path for path in sys.path if 'site-packages' in path or path in ('', os.getcwd())]", []),
        ("[number for number in range(64) if is_open(number) and not is_pipe(number)]", [0, 1, 2]),
        ("[os.fstat(number).st_rdev for number in (0, 1, 2)]", [os.stat(os.devnull).st_rdev] * 3),
        ("len([number for number in range(64) if is_open(number)])", 5),
        ("resource.getrlimit(resource.RLIMIT_AS)", (2**30, 2**30)),
        ("resource.getrlimit(resource.RLIMIT_FSIZE)", (2**20, 2**20)),
        ("resource.getrlimit(resource.RLIMIT_NOFILE)", (32, 32)),
        ("resource.getrlimit(resource.RLIMIT_CPU)", (21, 21)),
        ("resource.getrlimit(resource.RLIMIT_CORE)", (0, 0)),
    ],
)
def test_a_program_has_limits_and_nothing_of_its_user(expression: str, value: object) -> None:
    code = f"""
import importlib.util, os, resource, stat, sys
def is_open(number):
    try:
        return os.fstat(number) is not None
    except OSError:
        return False
def is_pipe(number):
    return stat.S_ISFIFO(os.fstat(number).st_mode)
def f():
    return {expression}
"""
    reads, writes = os.pipe()
    for number in (reads, writes):
        os.set_inheritable(number, True)
    try:
        run = run_tests(code, f"assert f() == {value!r}, f()", timeout=20)
    finally:
        os.close(reads)
        os.close(writes)
    assert run.passed, run.failure


FORKS = {
    "fork": "os.fork()",
    "two forks and a session": "os.fork() or (os.setsid(), os.fork())",
    "fork by ctypes": "libc.fork()",
    "two forks and a session by ctypes": "libc.fork() or (libc.setsid(), libc.fork())",
    "vfork by number": "libc.syscall(58)",
    "clone by number": "libc.syscall(56, 17, 0, 0, 0, 0)",
    "clone3 by number": "libc.syscall(435, bytes(64), 64)",
    "spawn": "os.posix_spawn('/bin/sleep', ['sleep', '60'], {})",
    "system": "os.system('sleep 60 &')",
    "spawn by ctypes": "libc.system(b'sleep 60 &')",
    "multiprocessing": "multiprocessing.Process(target=time.sleep, args=(60,)).start()",
}


@pytest.mark.parametrize("name", FORKS)
def test_no_process_of_a_program_outlives_the_run(name: str) -> None:
    """Orphans are given to the process that runs the tests here, in whatever session they are."""
    script = f"""
import ctypes, os, time
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
from quietstar.tasks.code import run_tests
program = '''
import ctypes, multiprocessing, os, time
libc = ctypes.CDLL(None)
def f(x):
    me = os.getpid()
    try:
        {FORKS[name]}
    except OSError:
        pass
    if os.getpid() != me:
        time.sleep(60)
    return x + 1
'''
run = run_tests(program, "assert f(1) == 2", 20)
time.sleep(0.2)
try:
    left = os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    left = None
print(run, left)
assert left is None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


OLDER = """
import ctypes, importlib.util, sys
library_of = ctypes.CDLL
class Older:
    def __init__(self, name):
        self.library = library_of(name)
    def __getattr__(self, name):
        return getattr(self.library, name)
    def syscall(self, number, *arguments):
        if number == 444 and arguments[0] is None:
            return {version}
        return self.library.syscall(number, *arguments)
ctypes.CDLL = Older
spec = importlib.util.spec_from_file_location("runner", {runner!r})
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
runner.main()
"""
TRIES = """
import os
def f(name, *arguments):
    try:
        {"open": open, "remove": os.remove, "mkdir": os.mkdir, "truncate": os.truncate}[name](*arguments)
    except OSError:
        return "refused"
    return "done"
"""


@pytest.mark.parametrize(
    ("version", "reads", "writes"), [(-1, True, False), (1, False, False), (2, False, False), (3, False, True)]
)
def test_what_each_version_of_landlock_allows(
    version: int, reads: bool, writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, runner = tmp_path / "victim", tmp_path / "runner.py"
    victim.write_text("kept")
    runner.write_text(OLDER.format(version=version, runner=str(code_task.RUNNER)))
    monkeypatch.setattr(code_task, "RUNNER", runner)
    told = {True: "done", False: "refused"}
    tries = {
        ("open", str(victim)): reads,
        ("open", "/proc/self/environ"): reads,
        ("open", str(victim), "w"): False,
        ("truncate", str(victim), 0): False,
        ("remove", str(victim)): False,
        ("open", "mine", "w"): writes,
        ("mkdir", "directory"): writes,
        ("open", os.__file__): True,
    }
    tests = [f"assert f(*{arguments!r}) == {told[allowed]!r}, {arguments!r}" for arguments, allowed in tries.items()]
    run = run_tests(TRIES, "\n".join(tests), timeout=20)
    assert run.passed, run.failure
    assert victim.read_text() == "kept"


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.forkpty()",
        "os.system('true')",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.spawnv(os.P_WAIT, '/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 1))",
        "os.kill(os.getppid(), 0)",
        "os.killpg(os.getppid(), 0)",
        "open(VICTIM).read()",
        "open(VICTIM, 'w')",
        "os.remove(VICTIM)",
    ],
)
def test_without_seccomp_functions_of_python_are_refused_and_landlock_holds(
    attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    victim = tmp_path / "victim"
    victim.write_text("kept")
    program = f"""
import os, socket, subprocess
VICTIM = {str(victim)!r}
def f():
    try:
        {attempt}
    except PermissionError:
        return "refused"
    return "done"
"""
    run = run_tests(program, "assert f() == 'refused', f()", timeout=20)
    assert run.passed, run.failure
    assert victim.read_text() == "kept"


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.system('true') == 0 or os.open('/', os.O_RDWR)",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 0)",
        "socket.socket()",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "os.remove(os.__file__)",
    ],
)
def test_the_process_of_the_tests_is_sealed_too(attempt: str) -> None:
    """It was not, so that a module which it imported at the program's wish started a script of the program."""
    tests = f"import os, socket, subprocess\ntry:\n    {attempt}\nexcept OSError:\n    pass\nelse:\n    assert False"
    run = run_tests("", tests, timeout=20)
    assert run.passed, run.failure


def test_the_two_processes_share_no_directory() -> None:
    code = "import os\nopen('mine', 'w').close()\ndef f(): return os.listdir()"
    run = run_tests(code, "import os\nopen('its', 'w').close()\nassert f() == ['mine'] and os.listdir() == ['its']", 20)
    assert run.passed, run.failure


@pytest.mark.parametrize(
    "fill",
    [
        "for n in range(300):\n    open(str(n), 'w').close()",
        "for n in range(40):\n    open(str(n), 'wb').write(b'x' * 2**20)",
        "import os\nfor n in range(300):\n    os.mkdir(str(n))",
        "import os\nfor n in range(300):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nfor n in range(50):\n    os.mkdir('d' * 250)\n    os.chdir('d' * 250)",
    ],
)
def test_what_a_program_writes_is_limited_together(fill: str) -> None:
    """Each file was limited, but not how many there were: 300 files of a mebibyte were written."""
    run = run_tests(f"{fill}\nimport time\ntime.sleep(3)\ndef f(): pass", "f()", timeout=20)
    assert run.failure == "wrote more than 200 files or 16 MiB"
