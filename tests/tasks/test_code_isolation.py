"""A program cannot pass without doing what its tests ask, and cannot reach beyond its process and its directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietstar.tasks.code import run_tests

TEST = "assert f(1) == 2\nassert f(41) == 42"
RIGHT = "\ndef f(x):\n    return x + 1\n"
ALWAYS = "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"

FRAMES = """
import sys
frame = sys._getframe()
while frame:
    for space in (frame.f_locals, frame.f_globals):
        for name, value in list(space.items()):
            if isinstance(value, dict) and "tests" in value:
                value["tests"] = ""
                value["code"] = ""
    frame = frame.f_back
"""
COLLECTOR = """
import gc
for value in gc.get_objects():
    if isinstance(value, dict):
        for key in ("tests", "token", "request"):
            if key in value:
                value[key] = ""
"""
FORGE = """
import os
for number in range(64):
    for line in (b'{"passed": true}', b'{"failure": null, "token": ""}\\n', b'{"names": {}}\\n'):
        try:
            os.write(number, line)
        except OSError:
            pass
os._exit(0)
"""
INSPECT = "import inspect\nfor one in inspect.stack():\n    one.frame.f_globals.update(exec=lambda *a: None)\n"


@pytest.mark.parametrize(
    "code",
    [
        FRAMES,
        COLLECTOR,
        FORGE,
        INSPECT,
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import atexit\natexit.register(print)",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: ''",
        "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return 0",
        "import sys\nsys.modules.clear()",
        "__name__ = '__main__'",
        ALWAYS + "def f(x): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(0)",
        "class Yes(list):\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "class f:\n    def __init__(self, x): pass\n    def __eq__(self, other): return True",
        "class M(type):\n    def __eq__(c, other): return True\nclass f(metaclass=M):\n    def __new__(c, x): return c",
        "def f(x):\n    raise StopIteration",
        "def f(x):\n    raise SystemExit(0)",
        "def f(x):\n    import os\n    os._exit(0)",
        "def f(x):\n    raise GeneratorExit",
        "def f(x): return f(x)",
        "f = " + "(" * 500 + "1" + ")" * 500,
        "f = " + "-" * 200_000 + "1",
        "f = 1\0",
    ],
)
def test_a_program_does_not_pass_without_the_asked_function(code: str) -> None:
    """A program that emptied the tests, found the token or exited early was once counted as right."""
    assert not run_tests(code, TEST, timeout=20).passed


@pytest.mark.parametrize(
    "reply",
    ["b'[' * 100_000", "b'9' * 10_000", "b'[]'", "b'null'", r"b'\xff'", "b'{' * 9", "b''", "b'{\"a\":' * 50_000"],
)
def test_a_reply_that_nobody_can_read_is_the_program_s_end(reply: str) -> None:
    """Deep JSON in place of an answer was a RecursionError among the tests, which a test may expect."""
    program = f"def f(x):\n    import os\n    for n in range(3, 64):\n        try: os.write(n, {reply} + b'\\n')\n"
    program += "        except OSError: pass\n    return 2"
    expecting = "try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError('no error')"
    assert not run_tests(program, expecting, timeout=20).passed
    assert run_tests("def f(x):\n    raise ValueError", expecting, timeout=20).passed


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (ALWAYS + "def f(x): return Yes()", "assert 2 in [f(1)]"),
        (
            "class A:\n    def __contains__(self, x): return True\n"
            "    def __iter__(self): return iter(())\ndef f(x): return A()",
            "assert 2 in f(1)",
        ),
        (
            "class A:\n    def __sub__(self, x): return 0\n    def __rsub__(self, x): return 0\ndef f(x): return A()",
            "assert abs(f(1) - 2) < 1e-6",
        ),
        (
            "class A:\n    def __lt__(self, x): return True\n    __gt__ = __lt__\ndef f(x): return A()",
            "assert f(1) < 2",
        ),
        ("def abs(x): return 0\ndef f(x): return 9", "assert abs(f(1) - 2) < 1e-6"),
        ("def sorted(x): return 1\ndef set(x): return 1\ndef f(x): return 9", "assert sorted([f(1)]) == sorted([2])"),
        (
            "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 9",
            "assert math.isclose(f(1), 2.0)",
        ),
        (
            "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 9",
            "import math\nassert math.isclose(f(1), 2)",
        ),
        ("def f(x):\n    raise StopIteration", "for x in map(f, [1, 2]):\n    assert x == 2"),
        ("def isinstance(*a): return True\ndef f(x): return 9", "assert isinstance(f(1), str)"),
    ],
)
def test_the_program_does_not_decide_whether_its_answer_is_right(code: str, tests: str) -> None:
    assert not run_tests(code, tests, timeout=20).passed


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/proc/%d/environ' % os.getppid()).read()",
        "open('/proc/self/status').read()",
        "open(os.path.expanduser('~root') + '/.profile').read()",
        "open('/etc/passwd').read()",
        "open(VICTIM).read()",
        "open(VICTIM, 'w')",
        "open(VICTIM, 'a')",
        "os.remove(VICTIM)",
        "os.rename(VICTIM, 'mine')",
        "os.truncate(VICTIM, 0)",
        "os.chmod(VICTIM, 0)",
        "os.utime(VICTIM)",
        "os.link(VICTIM, 'mine')",
        "os.symlink(VICTIM, 'mine')",
        "os.mkdir(os.path.dirname(VICTIM) + '/new')",
        "os.kill(os.getppid(), 9)",
        "os.killpg(0, 9)",
        "os.kill(-1, 0)",
        "libc('kill', os.getppid(), 0)",
        "libc('fork')",
        "libc('setsid')",
        "libc('ptrace', 16, os.getppid(), 0, 0)",
        "libc('socket', 2, 1, 0)",
        "libc('unlink', VICTIM.encode())",
        "libc('unshare', 0x10000000)",
        "libc('prctl', 1, 0, 0, 0, 0)",
        "libc('execv', b'/bin/true', None)",
        "libc('setrlimit', 7, struct.pack('QQ', 999, 999))",
        "libc('process_vm_readv', os.getppid(), None, 0, None, 0, 0)",
        "libc('shmget', 1, 64, 0o1666)",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (999, 999))",
        "os.setsid()",
        "os.fork()",
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(0, fcntl.F_NOTIFY, 1)",
        "libc('syscall', 425, 1, bytes(120))",  # io_uring_setup
        "libc('syscall', 424, 0, 0, 0, 0)",  # pidfd_send_signal
        "libc('syscall', 434, os.getppid(), 0)",  # pidfd_open
        "libc('syscall', 438, 0, 0, 0)",  # pidfd_getfd
        "libc('syscall', 428, 0, b'/', 0)",  # open_tree
        "libc('syscall', 435, bytes(64), 64)",  # clone3
        "libc('memfd_create', b'mine', 0)",
        "libc('mount', b'none', b'.', b'tmpfs', 0, None)",
        "libc('chroot', b'.')",
        "libc('personality', 0x40000)",
        "libc('setns', 0, 0)",
        "libc('mlockall', 3)",
        "libc('umask', 0)",
        "os.symlink('/etc/passwd', 'mine')",
        "os.chmod('.', 0)",
        "os.mkfifo('mine')",
        "os.nice(-5)",
        "os.setuid(1)",
        "os.setgroups([])",
        "os.sched_setaffinity(0, {0})",
        "os.pidfd_open(os.getppid())",
    ],
)
def test_a_program_is_refused_what_is_beyond_it(attempt: str, tmp_path: Path) -> None:
    """A program could read its parent's environment, delete the user's files and signal the process that judged it."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    code = f"""
import ctypes, fcntl, os, resource, struct
VICTIM = {str(victim)!r}
def libc(name, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def f():
    try:
        {attempt}
    except (OSError, ValueError):
        return "refused"
    return "done"
"""
    run = run_tests(code, "assert f() == 'refused', f()", timeout=20)
    assert run.passed, run.failure
    assert victim.read_text() == "kept" and os.listdir(tmp_path) == ["victim"]


def test_without_landlock_a_program_writes_nothing_at_all(tmp_path: Path) -> None:
    """A kernel before 5.13 is played by a filter of system calls that does not know Landlock."""
    script = """
import ctypes, struct, sys
from quietstar.tasks.code import run_tests
step = lambda code, value, yes=0, no=0: struct.pack("HBBI", code, yes, no, value)
code = step(0x20, 0) + step(0x15, 444, 0, 1) + step(6, 0x50026) + step(6, 0x7FFF0000)
kept = ctypes.create_string_buffer(code, len(code))
library = ctypes.CDLL(None)
assert library.prctl(38, 1, 0, 0, 0) == 0
assert library.prctl(22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(kept)), 0, 0) == 0
program = '''
def f(*attempt):
    import os
    try:
        {"open": open, "remove": os.remove, "mkdir": os.mkdir}[attempt[0]](*attempt[1:])
    except PermissionError:
        return "refused"
'''
path = sys.argv[1]
tests = [f'assert f("open", {path!r}, "w") == "refused"', f'assert f("remove", {path!r}) == "refused"']
tests += ['assert f("open", "mine", "w") == "refused"', 'assert f("mkdir", "mine") == "refused"']
tests += [f'assert f("open", {path!r}) is None']  # it can be read
run = run_tests(program, "\\n".join(tests), 20)
assert run.passed, run.failure
"""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    done = subprocess.run([sys.executable, "-c", script, str(victim)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "kept"


@pytest.mark.parametrize(
    "code",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()" + RIGHT,
        "import atexit, time\natexit.register(time.sleep, 60)" + RIGHT,
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)" + RIGHT,
        "print('noise' * 10**6)" + RIGHT,
        "import sys\nsys.stdout.close()" + RIGHT,
    ],
)
def test_what_a_right_program_leaves_behind_does_not_keep_its_check(code: str) -> None:
    began = time.monotonic()
    run = run_tests(code, TEST, timeout=20)
    assert run.passed, run.failure
    assert time.monotonic() - began < 10
