"""Compiling kernel calls for GPUs that are not there, and reading what came out.

A `Launch` is specialised as Triton's own launcher would (pointers and sizes divisible by 16, sizes equal to 1, what
the kernel asks not to be specialised), with Triton's own functions, and compiled by the assembler that Triton ships.
Nothing is taken from a cache, nor from `TRITON_*` variables of the environment.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

# Triton reads its environment when it is imported, so that only a worker imports it, or anything that does.
if TYPE_CHECKING:
    from quietstar_kernels.launch import Launch

KIBIBYTE = 1024
TIME_LIMIT = 300.0
"""Seconds after which a compiler counts as hanging."""

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and threads of a warp."""

SHARED_MEMORY_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB that one program may have."""

PROGRAM_LIMITS = {"sm_80": (64, 32), "sm_86": (48, 16), "sm_90": (64, 32), "sm_100": (64, 32), "gfx942": (32, 32)}
"""Warps and programs that a multiprocessor holds at most."""

REGISTERS = 512
"""Registers of a thread, for all warps that share a scheduler; a multiprocessor has four."""

TENSOR_MEMORY_LIMIT = 512
"""Columns of a Blackwell multiprocessor, all of which one program may have."""

MATRIX_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mma_sync": r"\bmma\.sync\.",
    "mfma": r"\bv_mfma_",
}
"""Patterns of Hopper's, Blackwell's and Ampere's matrix instructions in PTX, and of AMD's in its assembly."""

ASYNC_COPIES = r"\bcp\.async\.(?:c[ag]\.|bulk\.tensor)"
"""Pattern of copies from global to shared memory that no thread waits for, in PTX."""

SASS_MATRIX_INSTRUCTION = re.compile(r"\b(?:HGMMA|HMMA|DMMA|UTC\w*MMA)\b")
SASS_LINE = re.compile(r"^(\.\w+):|/\*[0-9a-f]{4,}\*/\s+((?:@\S+ )?)([A-Z][\w.]*)([^;]*);", re.MULTILINE)
"""A label; or the predicate, the name and the operands of an instruction."""


@dataclass(frozen=True)
class Task:
    """One kernel to compile; `variant` is one of `kernel_cases.variants`."""

    architecture: str
    kernel: str
    case: str
    variant: str
    configuration: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports for one kernel.

    Attributes:
        registers: of a thread; on gfx942 vector registers of both kinds.
        spill_stores, spill_loads: bytes of a thread; on gfx942 the stores count spilled vector registers, the loads 0.
        stack: bytes of a thread.
        shared_memory: bytes of a program.
        tensor_memory: columns of a program (Blackwell).
        programs: that a multiprocessor holds at a time.
        async_copies: instructions that copy to shared memory while the program goes on (NVIDIA).
        loops: instructions of each loop of matrix products, else of each loop, as in "212 + 493" (NVIDIA).
        loop_spills: of those the ones that store or load what was spilled.
        wgmma, tcgen05, mma_sync, mfma: matrix instructions in the code, by kind.
        seconds: that compiling took.
        error: why there is no code; empty where there is.
    """

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared_memory: int = 0
    tensor_memory: int = 0
    programs: int = 0
    async_copies: int = 0
    loops: str = ""
    loop_spills: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    mma_sync: int = 0
    mfma: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0

    def matrix_instructions(self) -> dict[str, int]:
        """Kind -> number, of those that occur."""
        return {kind: count for kind in MATRIX_INSTRUCTIONS if (count := getattr(self, kind))}

    def fits(self, architecture: str) -> bool:
        """Whether a program has room on the chip."""
        return (
            self.shared_memory <= SHARED_MEMORY_LIMIT[architecture] * KIBIBYTE
            and self.tensor_memory <= TENSOR_MEMORY_LIMIT
        )


def specialize(launch: Launch, architecture: str) -> tuple[Any, Any]:
    """The source that Triton's launcher would hand to its compiler, and the options: of them a kernel is made.

    Calls whose sources have the same `hash()` run the same kernel.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*TARGETS[architecture]))
    kernel = launch.kernel
    # What JITFunction.run does between the call and the compiler. It asks the driver for the device and so cannot be
    # called without one; its parts can.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), parsed


def resident_programs(compiled: Compiled, architecture: str, warps: int) -> int:
    """Programs that a multiprocessor holds at a time, by registers, shared memory, tensor memory and warps."""
    most_warps, most_programs = PROGRAM_LIMITS[architecture]
    reserved = 1 if architecture.startswith("sm_") else 0  # KiB of every program, for the system
    shared = compiled.shared_memory + reserved * KIBIBYTE
    limits = [most_programs, most_warps // warps]
    # registers are given to a warp by eights, and a warp stays with its scheduler
    limits.append(4 * (REGISTERS // (8 * max(1, -(-compiled.registers // 8)))) // warps)
    limits.append((SHARED_MEMORY_LIMIT[architecture] + reserved) * KIBIBYTE // max(shared, 1))
    limits.append(TENSOR_MEMORY_LIMIT // max(compiled.tensor_memory, 1))
    return min(limits)


def loops_of(assembly: str) -> list[list[str]]:
    """Names of the instructions of each innermost loop with matrix products, of each loop where there are none.

    Args:
        assembly: what `nvdisasm` makes of one kernel.
    """
    import networkx  # as torch does

    graph, labels, names = networkx.DiGraph(), {}, []
    branches: list[tuple[int, str]] = []
    falls_through = False
    for label, predicate, name, operands in SASS_LINE.findall(assembly):
        if label:
            labels[label] = len(names)
            continue
        place = len(names)
        graph.add_node(place)
        if falls_through:
            graph.add_edge(place - 1, place)
        kind = name.split(".")[0]
        if target := re.search(r"`\((\.\w+)\)", operands) if kind in ("BRA", "CALL") else None:
            branches.append((place, target[1]))
        # a branch may also be taken only where another register says so, which then stands before its target
        conditional = bool(predicate) or bool(re.match(r"\s*!?U?P\d", operands))
        falls_through = kind not in ("BRA", "EXIT", "RET", "JMP") or conditional
        names.append(name)
    graph.add_edges_from((place, labels[label]) for place, label in branches if label in labels)

    def innermost(nodes: set[int], wanted: set[int]) -> list[set[int]]:
        """The loops among these instructions that hold a wanted one and no smaller loop that does."""
        found = []
        for part in map(set, networkx.strongly_connected_components(graph.subgraph(nodes))):
            if len(part) > 1 and part & wanted:
                entries = {place for place in part if set(graph.predecessors(place)) - part}
                found += innermost(part - (entries or {min(part)}), wanted) or [part]
        return found

    matrix = {place for place, name in enumerate(names) if SASS_MATRIX_INSTRUCTION.match(name)}
    loops = innermost(set(graph), matrix) or innermost(set(graph), set(graph))
    return [[names[place] for place in sorted(part)] for part in sorted(loops, key=min)]


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compile one call for an architecture. To be called in a worker, whose environment is clean.

    Raises:
        Exception: whatever Triton's compiler does.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    start = time.perf_counter()
    source, options = specialize(launch, architecture)
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True  # the assembler's report of registers and spills, on stdout
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[architecture]), options=options.__dict__)
    seconds = round(time.perf_counter() - start, 2)
    loops: list[list[str]] = []
    if "ptx" in compiled.asm:
        code = compiled.asm["ptx"]
        figures = read_nvidia(log.getvalue())
        loops = loops_of(disassemble(compiled.asm["cubin"]))
    else:
        code = compiled.asm["amdgcn"]
        figures = read_amd(code)
    matrix = {kind: len(re.findall(pattern, code)) for kind, pattern in MATRIX_INSTRUCTIONS.items()}
    found = Compiled(
        **figures,
        **matrix,
        shared_memory=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        async_copies=len(re.findall(ASYNC_COPIES, code)),
        loops=" + ".join(str(len(names)) for names in loops),
        loop_spills=sum(name.startswith(("STL", "LDL")) for names in loops for name in names),
        seconds=seconds,
    )
    return replace(found, programs=resident_programs(found, architecture, compiled.metadata.num_warps))


def disassemble(cubin: bytes) -> str:
    """The machine code of a kernel as text, by the disassembler that Triton ships."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_nvidia(log: str) -> dict[str, int]:
    """The figures in the report of `ptxas -v`, the sums over its functions."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        raise ValueError(f"no figures in the assembler's report: {log!r}")
    stack, stores, loads = (sum(int(frame[k]) for frame in frames) for k in range(3))
    return {
        "registers": max(map(int, registers)),
        "spill_stores": stores,
        "spill_loads": loads,
        "stack": stack,
    }


def read_amd(assembly: str) -> dict[str, int]:
    """The figures in the metadata at the end of AMD's assembly."""

    def figure(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, flags=re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{name} in the assembly's metadata")
        return int(found[1])

    return {
        "registers": figure("vgpr_count"),
        "spill_stores": figure("vgpr_spill_count"),
        "spill_loads": 0,
        "stack": figure("private_segment_fixed_size"),
    }


def compile_task(task: Task) -> Compiled:
    """Compile one task; an error becomes a result. To be called in a worker."""
    import torch

    from benchmarks import kernel_cases
    from quietstar_kernels.launch import Launch

    try:
        launch = kernel_cases.launch(
            task.kernel, task.case, task.variant, dict(task.configuration), torch.device("meta")
        )
        assert isinstance(launch, Launch)
        return compile_launch(launch, task.architecture)
    except Exception as error:  # whatever the compiler raises belongs to this kernel, and the others are still to come
        return Compiled(error=summary(error))


def summary(error: BaseException | None) -> str:
    """An error and those that caused it on one line, of each the end: Triton's begin with source code."""
    chain = []
    while error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        chain.append(f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__)
        error = error.__cause__ or error.__context__
    return " <- ".join(chain)


def triton_version() -> str:
    """The version that a worker imports."""
    import triton

    return str(triton.__version__)


# ------------------------------------------------------------------------------------------------------------- workers


def clean_environment() -> None:
    """Remove what would change the result: the interpreter, another assembler, debugging options."""
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]


def _work(connection: multiprocessing.connection.Connection, cache: str) -> None:
    """A worker: answers tasks until it is told to stop."""
    clean_environment()
    os.environ["TRITON_CACHE_DIR"] = cache
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # the default is what users run
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):  # whoever asked is gone
        while (task := connection.recv()) is not None:
            connection.send(triton_version() if task == "version" else compile_task(task))


class Worker:
    """A process that compiles. One that dies, as LLVM does where it does not know how, is replaced."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._context = multiprocessing.get_context("spawn")  # a fork would have imported Triton already
        self._process: Any = None

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=_work, args=(other, self._cache), daemon=True)
        self._process.start()
        other.close()

    def ask(self, task: Task | str) -> Any:
        if self._process is None:
            self._start()
        try:
            self._connection.send(task)
            if not self._connection.poll(TIME_LIMIT):
                self._stop()
                return Compiled(error=f"the compiler took more than {TIME_LIMIT:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return Compiled(error=f"the compiler died with exit code {code}")

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(timeout=5)
            if self._process is not None and self._process.is_alive():
                self._stop()


class Compilers:
    """Worker processes that compile, to be used in a `with` statement; methods may be called from any thread.

    Args:
        jobs: compilers that run at a time. They start when they are first needed.

    Attributes:
        cache: folder of what is compiled; a process with the same `TRITON_CACHE_DIR` loads it.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = max(1, jobs)

    def __enter__(self) -> Compilers:
        self._folder = tempfile.TemporaryDirectory()
        self.cache = self._folder.name
        self._workers = [Worker(self.cache) for _ in range(self._jobs)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()

    def compile(self, task: Task) -> Compiled:
        """Compile one task, as soon as a worker is idle."""
        compiled = self._ask(task)
        assert isinstance(compiled, Compiled)
        return compiled

    def compile_all(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Compiled]]:
        """Compile tasks, in the order in which they are done."""
        with ThreadPoolExecutor(self._jobs) as threads:
            waiting = {threads.submit(self.compile, task): task for task in tasks}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def triton_version(self) -> str:
        """Version of the Triton that compiles."""
        return str(self._ask("version"))

    def _ask(self, task: Task | str) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(task)
        finally:
            self._idle.put(worker)


def as_row(task: Task, compiled: Compiled) -> dict[str, object]:
    """One line of a table: what was compiled, then what came out. `seconds` differ from run to run and are left out."""
    row: dict[str, object] = {**asdict(task), "configuration": describe_configuration(dict(task.configuration))}
    row |= asdict(replace(compiled, seconds=0.0))
    del row["seconds"]
    return row


def describe_configuration(configuration: dict[str, int]) -> str:
    """As in "BLOCK_M=64 BLOCK_N=64 num_warps=4 num_stages=2"."""
    return " ".join(f"{name}={value}" for name, value in configuration.items())
