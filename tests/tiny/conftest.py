import pytest

from safediffusion.tiny.build import build
from safediffusion.tiny.stages import Plan


@pytest.fixture(scope="session")
def short_plan():
    """Every stage in a few steps, on a few pictures, with a checkpoint in the middle."""
    return Plan(
        detector=3,
        autoencoder=3,
        reward=3,
        reward_order=3,
        judge=3,
        guard=3,
        base=3,
        base_words=3,
        base_order=3,
        base_upright=3,
        base_settle=3,
        flow=3,
        flow_settle=3,
        flow_hints=3,
        pictures=96,
        twins=48,
        mirrored=24,
        batch=6,
        checkpoint_every=2,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory, short_plan):
    """A whole build, never written to: `built / "out"` holds the package, `built / "work"` what it was made of."""
    folder = tmp_path_factory.mktemp("build")
    build(folder / "out", folder / "work", plan=short_plan)
    return folder
