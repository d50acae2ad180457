"""Model chunks for the stages of any schedule, with Megatron's own GPTModel.

Megatron asks a process group where in the model a chunk is. A view with the stage's number in the
pipeline group's place, and a configuration with as many pipeline ranks as there are stages, give
every chunk its layers, their numbers and its offsets in a distributed checkpoint, wherever the
schedule puts it. Checkpoints therefore do not depend on the schedule.
"""

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from mhc_megatron.errors import UserError


@dataclass(frozen=True)
class StageView:
    """What Megatron asks of a pipeline process group when it builds a chunk.

    Attributes:
        stage: of the model, numbered from the input to the loss.
        num_stages: of the whole model.
    """

    stage: int
    num_stages: int

    def rank(self) -> int:
        """The stage's number."""
        return self.stage

    def size(self) -> int:
        """The number of stages."""
        return self.num_stages


@dataclass(frozen=True, kw_only=True)
class StagePlace:
    """Where a chunk stands in the model.

    Attributes:
        stage: as in ``StageView``.
        groups: for ``GPTModel(pg_collection=...)``; its ``pp`` is a StageView.
        pre_process: the chunk has the embedding.
        post_process: the chunk has the final norm, the output layer and the loss.
    """

    stage: int
    groups: ProcessGroupCollection
    pre_process: bool
    post_process: bool


def stage_place(config: TransformerConfig, stage: int) -> StagePlace:
    """The place of ``stage``.

    Args:
        config: with ``pipeline_model_parallel_size`` set to the number of stages and without
            virtual stages, whatever the number of pipeline ranks is.
        stage: from 0.

    Raises:
        UserError: an explicit pipeline layout or virtual stages, which number chunks otherwise.
    """
    if config.pipeline_model_parallel_layout is not None:
        raise UserError(
            "pipeline_model_parallel_layout numbers chunks in loops, not by a schedule's stages; "
            "leave it out, num_layers_in_first_pipeline_stage and _last_ stay available"
        )
    if config.virtual_pipeline_model_parallel_size is not None:
        raise UserError(
            "virtual_pipeline_model_parallel_size="
            f"{config.virtual_pipeline_model_parallel_size} beside a schedule's own stages; set it "
            "to None and pipeline_model_parallel_size to the number of stages"
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    num_stages = config.pipeline_model_parallel_size
    groups.pp = StageView(stage, num_stages)
    return StagePlace(
        stage=stage,
        groups=groups,
        pre_process=stage == 0,
        post_process=stage == num_stages - 1,
    )
