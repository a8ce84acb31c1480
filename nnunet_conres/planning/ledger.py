"""Bookkeeping of what autograd keeps, in bytes: operations on tensors that have a shape and a type, but no values.

An operation makes its output, notes what PyTorch keeps of it for backward, and is forgotten like any Python object when
nothing refers to it any more; `Ledger.backward` then goes back through what is kept. A network written down in these
operations is weighed in milliseconds, without PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

FLOAT32 = 4
HALF = 2


class Storage:
    """Memory that is held as long as the object lives."""

    __slots__ = ("ledger", "nbytes", "part")

    def __init__(self, ledger: Ledger, nbytes: int) -> None:
        self.ledger = ledger
        self.nbytes = nbytes
        self.part = ledger.part
        ledger.current += nbytes
        ledger.by_part[self.part] = ledger.by_part.get(self.part, 0) + nbytes
        ledger.peak = max(ledger.peak, ledger.current)

    def __del__(self) -> None:
        self.ledger.current -= self.nbytes
        self.ledger.by_part[self.part] -= self.nbytes


@dataclass(eq=False)
class Node:
    """What autograd keeps of an operation, and what its backward makes.

    Attributes:
        parents: Nodes that get a gradient, and its size; 0 for the incoming gradient itself, or a view of it.
        kept: Storages kept for backward.
        temporary: Bytes that backward needs beside the gradients.
        gradient: The incoming gradient, once there is one.
        shares_gradient: Whether others use the same memory, so that nothing can be added in place.
        recompute: Makes the nodes of a checkpointed region anew.
    """

    parents: list[tuple[Node | None, int]]
    kept: list[Storage]
    temporary: int = 0
    gradient: Storage | None = None
    shares_gradient: bool = False
    recompute: Callable[[], list[Node]] | None = None


class Parameter(Node):
    """A leaf: its gradient stays.

    Args:
        numel: Number of elements.
        is_matrix: Whether Muon would take it for a matrix: weights of convolutions, but for those of heads.
    """

    def __init__(self, numel: int, is_matrix: bool = False) -> None:
        super().__init__([], [])
        self.numel = numel
        self.is_matrix = is_matrix
        self.lowered: tuple[Storage, Node] | None = None


@dataclass(eq=False)
class Sized:
    """A tensor without values.

    Attributes:
        shape: (B, C, X, Y, Z).
        itemsize: Bytes of a number.
        storage: Its memory, which views share.
        node: The operation that made it, None where no gradient is wanted.
    """

    shape: tuple[int, ...]
    itemsize: int
    storage: Storage
    node: Node | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[2:]


@dataclass
class Ledger:
    """Counts live bytes.

    Attributes:
        mixed: Whether autocast is on.
        cuda: Whether it is that of CUDA, to float16, rather than that of a CPU, to bfloat16.
        current: Bytes alive.
        peak: The most so far.
        by_part: Bytes alive of every part of the network.
        part: Name of the part that operations belong to from now on.
    """

    mixed: bool
    cuda: bool
    current: int = 0
    peak: int = 0
    by_part: dict[str, int] = field(default_factory=dict)
    part: str = ""
    _nodes: list[Node] = field(default_factory=list)
    _records: bool = True
    _caches_casts: bool = True
    _cached: list[Parameter] = field(default_factory=list)

    # --- engine -----------------------------------------------------------------------------------------------------

    def storage(self, nbytes: int) -> Storage:
        """New memory."""
        return Storage(self, nbytes)

    def tensor(self, shape: Sequence[int], itemsize: int) -> Sized:
        """A tensor that wants no gradient."""
        return Sized(tuple(shape), itemsize, self.storage(math.prod(shape) * itemsize))

    def record(
        self, parents: Sequence[tuple[Node | None, int]], kept: Sequence[Storage], temporary: int = 0
    ) -> Node | None:
        """Notes an operation for backward, if one of its inputs wants a gradient."""
        wanted = [(parent, nbytes) for parent, nbytes in parents if parent is not None]
        if not wanted:
            return None
        node = Node(list(wanted), list(kept) if self._records else [], temporary)
        if self._records:
            self._nodes.append(node)
        return node

    def output(
        self,
        shape: Sequence[int],
        itemsize: int,
        parents: Sequence[tuple[Node | None, int]],
        kept: Sequence[Storage] = (),
        keep_output: bool = False,
        temporary: int = 0,
    ) -> Sized:
        """The output of an operation, in memory of its own."""
        result = self.tensor(shape, itemsize)
        result.node = self.record(parents, [*kept, *([result.storage] if keep_output else [])], temporary)
        return result

    def checkpoint(
        self, enabled: bool, function: Callable[..., Sized | tuple[Sized, ...]], *args: Sized
    ) -> list[Sized]:
        """What a function puts out, computed again for backward if enabled."""
        if not enabled:
            result = function(*args)
            return list(result) if isinstance(result, tuple) else [result]
        records, self._records = self._records, False
        part = self.part
        try:
            result = function(*args)
        finally:
            self._records = records
        outputs = list(result) if isinstance(result, tuple) else [result]

        def recompute() -> list[Node]:
            outer, self._nodes = self._nodes, []
            self.part = part
            inputs = [Sized(a.shape, a.itemsize, a.storage, a.node) for a in args]
            again = function(*inputs)
            again_outputs = list(again) if isinstance(again, tuple) else [again]
            inner, self._nodes = self._nodes, outer
            for first, second in zip(outputs_nodes, again_outputs, strict=True):
                assert second.node is not None
                second.node.gradient, first.gradient = first.gradient, None
                second.node.shares_gradient = first.shares_gradient
            return inner

        region = Node([], [a.storage for a in args], recompute=recompute)
        # gradients arrive at these, one for each output; the region is entered behind the last of them
        outputs_nodes = [Node([], []) for _ in outputs]
        self._nodes.append(region)
        return [Sized(o.shape, o.itemsize, o.storage, n) for o, n in zip(outputs, outputs_nodes, strict=True)]

    def end_of_autocast(self) -> None:
        """Autocast forgets the casts of parameters; whoever keeps them for backward still has them."""
        for parameter in self._cached:
            parameter.lowered = None
        self._cached.clear()
        self._caches_casts = False

    def backward(self, loss: Sized) -> None:
        """Goes back from a scalar to the parameters."""
        assert loss.node is not None
        loss.node.gradient = self.storage(FLOAT32)
        nodes, self._nodes = self._nodes, []
        self._run(nodes)

    def _run(self, nodes: list[Node]) -> None:
        while nodes:
            node = nodes.pop()
            if node.recompute is not None:
                inner = node.recompute()
                node.recompute = None
                self._run(inner)
                node.kept.clear()
                continue
            gradient, node.gradient = node.gradient, None
            if gradient is None:  # an output that the loss does not use
                node.kept.clear()
                continue
            made = [
                (parent, gradient if nbytes == 0 else self.storage(nbytes), nbytes == 0)
                for parent, nbytes in node.parents
            ]
            if node.temporary:
                self.storage(node.temporary)
            del gradient
            node.kept.clear()
            while made:
                parent, storage, is_shared = made.pop(0)
                assert parent is not None
                if parent.gradient is None:
                    parent.gradient, parent.shares_gradient = storage, is_shared
                elif parent.shares_gradient:  # else added in place
                    parent.gradient = self.storage(min(storage.nbytes, parent.gradient.nbytes))
                    parent.shares_gradient = False
                del storage

    # --- operations -------------------------------------------------------------------------------------------------

    def cast(self, x: Sized, itemsize: int) -> Sized:
        """A copy in another type, or the tensor itself."""
        if x.itemsize == itemsize:
            return x
        return self.output(x.shape, itemsize, [(x.node, x.nbytes)])

    def _weight(self, parameter: Parameter) -> tuple[Storage | None, Node]:
        """What a convolution keeps of its weight, and where its gradient goes: a cast under autocast."""
        if not self.mixed:
            return None, parameter
        if parameter.lowered is not None:
            return parameter.lowered
        storage = self.storage(parameter.numel * HALF)
        node = self.record([(parameter, parameter.numel * FLOAT32)], [])
        assert node is not None
        if self._caches_casts:
            parameter.lowered = (storage, node)
            self._cached.append(parameter)
        return storage, node

    def convolution(
        self, x: Sized, weight: Parameter, bias: Parameter | None, shape: Sequence[int], standardized: bool = False
    ) -> Sized:
        """A convolution, transposed or not, that puts out a shape."""
        itemsize = HALF if self.mixed else FLOAT32
        x = self.cast(x, itemsize)
        kept = [x.storage]
        if standardized:
            full = self.storage(weight.numel * FLOAT32)
            of_weight = self.record([(weight, weight.numel * FLOAT32)], [full], temporary=weight.numel * FLOAT32)
            assert of_weight is not None
            if self.mixed:
                lowered = self.storage(weight.numel * HALF)
                of_weight = self.record([(of_weight, weight.numel * FLOAT32)], [])
                assert of_weight is not None
                kept.append(lowered)
            else:
                kept.append(full)
        else:
            cast, of_weight = self._weight(weight)
            if cast is not None:
                kept.append(cast)
        parents: list[tuple[Node | None, int]] = [(x.node, x.nbytes), (of_weight, weight.numel * itemsize)]
        if bias is not None:
            parents.append((self._weight(bias)[1], bias.numel * itemsize))
        return self.output(shape, itemsize, parents, kept)

    def norm(self, x: Sized, parameters: Sequence[Parameter]) -> Sized:
        """Instance or batch norm, which keep their input and a mean and deviation per channel."""
        statistics = self.storage(2 * x.shape[0] * x.channels * FLOAT32)
        parents = [(x.node, x.nbytes), *((p, p.numel * FLOAT32) for p in parameters)]
        return self.output(x.shape, x.itemsize, parents, [x.storage, statistics])

    def nonlinearity_in_place(self, x: Sized) -> Sized:
        """ReLU or leaky ReLU in place, which keep their output."""
        return Sized(x.shape, x.itemsize, x.storage, self.record([(x.node, x.nbytes)], [x.storage]))

    def nonlinearity(self, x: Sized) -> Sized:
        """ReLU or leaky ReLU, not in place: keep input (leaky) or output (ReLU), both of one size."""
        return self.output(x.shape, x.itemsize, [(x.node, x.nbytes)], [x.storage])

    def prelu(self, x: Sized, slope: Parameter) -> Sized:
        """PReLU, which keeps its input, and in backward makes a gradient of the slope for every voxel."""
        itemsize = HALF if self.mixed else x.itemsize
        x = self.cast(x, itemsize)
        return self.output(
            x.shape,
            itemsize,
            [(x.node, x.nbytes), (self._weight(slope)[1], slope.numel * itemsize)],
            [x.storage],
            temporary=x.nbytes,
        )

    def group_norm_relu(self, x: Sized, parameters: Sequence[Parameter]) -> Sized:
        """`frugal.GroupNormReLU`: keeps input and output; computes float16 in float32."""
        widened = FLOAT32 // x.itemsize if self.cuda and x.itemsize == HALF else 0
        if widened:
            wide = self.storage(2 * x.nbytes * widened)  # input and output
            del wide
        # the gradient behind the ReLU; or that, the input and its gradient, widened
        temporary = x.nbytes * (3 * widened or 1)
        parents = [(x.node, x.nbytes), *((p, p.numel * FLOAT32) for p in parameters)]
        return self.output(x.shape, x.itemsize, parents, [x.storage], keep_output=True, temporary=temporary)

    def dropout(self, x: Sized) -> Sized:
        """Dropout of whole channels, which keeps its mask."""
        mask = self.storage(math.prod(x.shape[:2]) * x.itemsize)
        return self.output(x.shape, x.itemsize, [(x.node, x.nbytes)], [mask])

    def add(self, a: Sized, b: Sized) -> Sized:
        """a + b."""
        itemsize = max(a.itemsize, b.itemsize)
        parents = [(t.node, 0 if t.itemsize == itemsize else t.nbytes) for t in (a, b)]
        return self.output(a.shape, itemsize, parents)

    def add_in_place(self, a: Sized, b: Sized) -> Sized:
        """a += b."""
        parents = [(t.node, 0 if t.itemsize == a.itemsize else t.nbytes) for t in (a, b)]
        return Sized(a.shape, a.itemsize, a.storage, self.record(parents, []))

    def cat(self, a: Sized, b: Sized) -> Sized:
        """Concatenation along the channels."""
        itemsize = max(a.itemsize, b.itemsize)
        shape = (a.shape[0], a.channels + b.channels, *a.size)
        parents = [(t.node, 0 if t.itemsize == itemsize else t.nbytes) for t in (a, b)]
        return self.output(shape, itemsize, parents)

    def crop(self, x: Sized, size: Sequence[int]) -> Sized:
        """A view of the first voxels."""
        for axis, extent in enumerate(size, start=2):
            if x.shape[axis] != extent:
                shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
                x = Sized(shape, x.itemsize, x.storage, self.record([(x.node, x.nbytes)], []))
        return x

    def pad_to_multiple(self, x: Sized, divisor: Sequence[int]) -> Sized:
        """Repeats the last voxels."""
        size = [-(-extent // d) * d for extent, d in zip(x.size, divisor, strict=True)]
        if tuple(size) == x.size:
            return x
        if self.mixed and not self.cuda:
            x = self.cast(x, FLOAT32)  # a CPU's autocast
        return self.output((*x.shape[:2], *size), x.itemsize, [(x.node, x.nbytes)], [x.storage])

    def pool(self, x: Sized, size: Sequence[int], average: bool) -> Sized:
        """Average or maximum over windows."""
        shape = (*x.shape[:2], *size)
        if average:
            if self.mixed and not self.cuda:
                x = self.cast(x, FLOAT32)  # a CPU's autocast
            return self.output(shape, x.itemsize, [(x.node, x.nbytes)], [x.storage])
        indices = self.storage(math.prod(shape) * 8)
        return self.output(shape, x.itemsize, [(x.node, x.nbytes)], [x.storage, indices])

    def resize(self, x: Sized, size: Sequence[int]) -> Sized:
        """`blocks.resize`: trilinear, in float32 on a GPU, whose autocast widens it."""
        if x.size == tuple(size):
            return x
        shape = (*x.shape[:2], *size)
        if not (self.mixed and self.cuda and x.itemsize == HALF):
            return self.output(shape, x.itemsize, [(x.node, x.nbytes)])
        wide = self.cast(x, FLOAT32)
        wide = self.output(shape, FLOAT32, [(wide.node, wide.nbytes)])
        return self.cast(wide, HALF)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Operations in this context belong to a part of the network."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before
