"""Which rank runs where: tensor parallelism inside a node, pipeline stages across. Pure."""

from dataclasses import dataclass

from mhc_megatron.errors import UserError
from mhc_megatron.training.layout import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """The coordinates of one rank in the layout."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The nodes of a run.

    Attributes:
        nodes: for each node its ranks, in the order of their GPUs.
    """

    nodes: tuple[tuple[Place, ...], ...]

    @property
    def num_nodes(self) -> int:
        """Derived from the layout; nobody types it."""
        return len(self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """Equal on all nodes."""
        return len(self.nodes[0])


def place(
    layout: ParallelConfig, *, ranks_per_node: int, tensor_across_nodes: bool = False
) -> Placement:
    """Nodes and ranks of a layout, in Megatron's default order (``tp-cp-ep-dp-pp``).

    Neighbours in tensor parallelism are neighbours in rank, so that they share a node; pipeline
    stages are the farthest apart. The two copies of a stage under bidirectional DualPipe count as
    data parallelism, as they do to Megatron.

    Args:
        layout: of the run.
        ranks_per_node: GPUs that a node has, or processes on a node without.
        tensor_across_nodes: accept a tensor-parallel group on two nodes.

    Raises:
        UserError: the ranks do not fill whole nodes, or a tensor-parallel group crosses nodes.
    """
    if ranks_per_node < 1:
        raise UserError(f"--ranks-per-node={ranks_per_node} must be at least 1")
    world = layout.world_size
    on_node = min(world, ranks_per_node)
    if world % on_node:
        raise UserError(
            f"{_product(layout)} = {world} ranks do not fill nodes of {ranks_per_node}; change the "
            f"layout to a multiple of {ranks_per_node}, or --ranks-per-node"
        )
    if on_node % layout.tensor and not tensor_across_nodes:
        raise UserError(
            f"parallel.tensor={layout.tensor} does not divide the {on_node} ranks of a node, so "
            "that tensor-parallel groups would cross nodes; change it, or pass "
            "--allow tensor-across-nodes"
        )
    places = [_place(layout, rank) for rank in range(world)]
    return Placement(
        nodes=tuple(tuple(places[first : first + on_node]) for first in range(0, world, on_node))
    )


def grid(placement: Placement) -> str:
    """A table for people: a line per node, a column per GPU; axes of size 1 are left out."""
    places = [place for node in placement.nodes for place in node]
    axes = [
        (letter, name)
        for letter, name in (("t", "tensor"), ("c", "context"), ("d", "data"), ("p", "pipeline"))
        if any(getattr(place, name) for place in places)
    ]
    cells = [
        [
            " ".join([str(p.rank), *(f"{letter}{getattr(p, name)}" for letter, name in axes)])
            for p in node
        ]
        for node in placement.nodes
    ]
    width = max(len(cell) for row in cells for cell in row)
    label = len(f"node {len(cells) - 1}")
    lines = [
        f"{f'node {index}':<{label}} | " + " | ".join(f"{cell:<{width}}" for cell in row)
        for index, row in enumerate(cells)
    ]
    legend = ", ".join(f"{letter} {name}" for letter, name in axes)
    return "\n".join([f"rank{', ' if legend else ''}{legend}", *lines])


def _place(layout: ParallelConfig, rank: int) -> Place:
    rest, tensor = divmod(rank, layout.tensor)
    rest, context = divmod(rest, layout.context)
    pipeline, data = divmod(rest, layout.data * layout.num_copies)
    return Place(rank=rank, tensor=tensor, context=context, data=data, pipeline=pipeline)


def _product(layout: ParallelConfig) -> str:
    sizes = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "data")}
    return " * ".join(f"parallel.{name}={size}" for name, size in sizes.items() if size > 1) or "1"
