"""How Triton kernels are specialized, launched and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pointformer.kernels.triton import tuning

# Programs along each axis, or what gives them for the constants, which the tuner varies.
Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]

INTERPRETED = triton.knobs.runtime.interpret
_LARGEST = (1 << 31) - 1  # of the integers that are 32 bits wide
_BACKEND = "hip" if torch.version.hip else "cuda"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """One specialization of a kernel: what is launched, and what is compiled ahead of time.

    Attributes:
        kernel: a `triton.jit` function.
        arguments: type of each argument that is not a constant, in order: a dtype for a pointer to
            such elements, or a scalar's type ("i32", "i64", "fp32").
        constants: the `tl.constexpr` arguments by name, which are the kernel's last.
        writes: names of the tensors that the kernel writes and does not read; the tuner leaves out
            a kernel that reads what it writes, and has none here.
        tiles: other values of constants that are right for the same arguments, at most with another
            grid: what the tuner may choose.
        num_warps, num_stages: see Triton. With Triton's warps of 32 threads on NVIDIA, 64 on AMD.
        amd_warps: the number of warps on AMD, if another.
        rounds: for the cost model, from the arguments and constants of a launch by name: how many
            rounds of each loop a program makes in all, on average. Loops are named as
            `pointformer.profiling.machine_code` says. It runs in place of the kernel, on the CPU,
            so it also writes those results that the rounds of later launches depend on.
        fp_fusion: let the compiler contract a * b + c to one rounding; off where results must equal
            the CPU's bit for bit.
        max_registers: per thread, on NVIDIA. Without it the assembler aims at many warps and
            spills a few registers for it.
    """

    kernel: Any
    arguments: tuple[torch.dtype | str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = field(default=(), compare=False)
    tiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    max_registers: int | None = None
    amd_warps: int | None = None
    rounds: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = field(
        default=None, compare=False
    )

    # By device and by what Triton specializes arguments for: what it compiled. To look that up
    # takes Triton several times as long as to launch.
    _compiled: dict[tuple, triton.compiler.CompiledKernel] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    # By what the tuner chose.
    _changed: dict[tuple, Variant] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def _last(self) -> list[object]:
        """The constants in the kernel's order."""
        names = self.kernel.arg_names[len(self.arguments) :]
        return [self.constants[name] for name in names]

    @cached_property
    def _kinds(self) -> list[tuple[torch.dtype | str, bool | None]]:
        """Of each argument its type, and whether its value decides what is compiled; `None` for
        tensors, whose alignment does, and on AMD's devices their size."""
        params = [] if INTERPRETED else self.kernel.params
        free = {param.name for param in params if param.do_not_specialize}
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return [
            (kind, None if isinstance(kind, torch.dtype) else kind[0] == "i" and name not in free)
            for name, kind in zip(names, self.arguments, strict=True)
        ]

    def programs(self, grid: Grid) -> tuple[int, ...]:
        """Along each axis."""
        return grid(self.constants) if callable(grid) else grid

    def launch(self, grid: Grid, *arguments) -> None:
        """Run on the device of the tensors; nothing happens where the grid is empty."""
        device: torch.device | None = None
        traits: list[object] = []
        for (kind, specialized), given in zip(self._kinds, arguments, strict=True):
            if specialized is None:
                if given.dtype != kind:
                    position = next(i for i, x in enumerate(arguments) if x is given)
                    raise TypeError(
                        f"{self.name}: argument {position} is {given.dtype}, expected {kind}"
                    )
                device = device or given.device
                traits.append(given.data_ptr() % 16 == 0)
                if _BACKEND == "hip":  # smaller storages are read with 32-bit offsets
                    traits.append(given.untyped_storage().size() <= _LARGEST)
            elif specialized:
                traits.append((given == 1, given % 16 == 0, given > _LARGEST))
            elif given > _LARGEST:
                traits.append(kind)
            else:
                traits.append(None)
        if 0 in self.programs(grid):
            return
        assert device is not None  # every kernel has a tensor
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(grid, arguments, device, tuple(traits))
        else:
            self._run(grid, arguments, device, tuple(traits))

    def _run(
        self, grid: Grid, arguments: tuple, device: torch.device, traits: tuple[object, ...]
    ) -> None:
        """Launch on the current device."""
        variant = self
        if self.writes and tuning.enabled():
            variant = self._tuned(grid, arguments, device)
        key = (device.index, traits)
        compiled = variant._compiled.get(key)
        if compiled is None:
            compiled = variant._first_launch(grid, arguments)
            if not INTERPRETED:
                variant._compiled[key] = compiled
            return
        compiled[(*variant.programs(grid), 1, 1)[:3]](*arguments, *variant._last)

    def _first_launch(self, grid: Grid, arguments: tuple) -> triton.compiler.CompiledKernel:
        """Launch what is not compiled yet, in the interpreter at every launch."""
        launcher = self.kernel[self.programs(grid)]
        return launcher(*arguments, **self.constants, **self._options(_BACKEND))

    def _tuned(self, grid: Grid, arguments: tuple, device: torch.device) -> Variant:
        """The variant that the tuner chooses for such a launch."""
        name = "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
        names = self.kernel.arg_names
        choice = tuning.tuner().best(
            self._key(name, tuning.size_class(self.programs(grid))),
            self.choices,
            lambda choice: self.changed(choice)._first_launch(grid, arguments),
            [arguments[names.index(output)] for output in self.writes],
            tuning.budget_of(self.arguments),
        )
        return self.changed(choice)

    @cached_property
    def choices(self) -> list[tuning.Choice]:
        """All that the tuner compares, the default first."""
        tiles = {
            name: tuple(dict.fromkeys((self.constants[name], *values)))
            for name, values in self.tiles.items()
        }
        warps = self._options(_BACKEND)["num_warps"]
        return list(tuning.choices(warps, self.num_stages, tiles))

    def changed(self, choice: tuning.Choice) -> Variant:
        """With other constants, warps or stages, always the same for the same choice."""
        if not choice:
            return self
        key = tuple(choice.items())
        if key not in self._changed:
            constants = {name: choice.get(name, value) for name, value in self.constants.items()}
            options: dict[str, Any] = {
                name: value for name, value in choice.items() if name not in constants
            }
            if "num_warps" in options:
                options["amd_warps"] = options["num_warps"]
            self._changed[key] = replace(self, constants=constants, **options)
        return self._changed[key]

    def compile(self, target: GPUTarget) -> triton.compiler.CompiledKernel:
        """Compile for a GPU that need not be there."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        types = [
            _POINTERS[kind] if isinstance(kind, torch.dtype) else kind for kind in self.arguments
        ]
        signature = dict(zip(names, types, strict=True))
        signature.update(dict.fromkeys(self.constants, "constexpr"))
        # As at launch: torch aligns allocations, and Triton then vectorizes loads.
        aligned = {
            (self.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in zip(names, types, strict=True)
            if kind.startswith("*")
        }
        source = ASTSource(self.kernel, signature, dict(self.constants), aligned)
        return triton.compile(source, target=target, options=self._options(target.backend))

    def _key(self, device: str, size: int) -> str:
        """What a choice of the tuner depends on; the kernel by a hash of its source."""
        types = [str(kind).removeprefix("torch.") for kind in self.arguments]
        source = getattr(self.kernel, "cache_key", "interpreted")[:16]
        parts = (self.name, device, triton.__version__, source, *types)
        constants = (f"{name}={value}" for name, value in self.constants.items())
        return " ".join((*parts, *constants, str(size)))

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def _options(self, backend: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        if self.amd_warps is not None and backend == "hip":
            options["num_warps"] = self.amd_warps
        if self.max_registers is not None and backend == "cuda":
            options["maxnreg"] = self.max_registers
        return options
