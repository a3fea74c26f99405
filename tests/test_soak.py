"""The long loops of `make soak`, shortened for a test. test_stopping.py tests killed runs."""

import pytest
import soak
import torch

from enact_common.data.images import decode_image
from enact_common.utils.errors import UserError


@pytest.mark.parametrize("loop", [soak.damaged_images, soak.damaged_annotations, soak.damaged_checkpoints])
def test_damaged_files_are_read_or_refused(tmp_path, loop):
    outcomes = loop(tmp_path, count=300)
    assert sum(outcomes.values()) == 300 and min(outcomes["read"], outcomes["refused"]) > 10


def test_other_errors_and_bad_results_fail_the_soak(tmp_path, monkeypatch):
    def careless(path):
        try:
            return decode_image(path)
        except UserError as error:
            raise ValueError from error

    monkeypatch.setattr(soak, "decode_image", careless)
    with pytest.raises(ValueError):
        soak.damaged_images(tmp_path, count=100)
    monkeypatch.setattr(soak, "decode_image", lambda path: torch.zeros(3, 0, 4, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="gave torch.uint8"):
        soak.damaged_images(tmp_path, count=1)


def test_trainings_from_several_seeds_end_alike_in_both_precisions(tmp_path):
    result = soak.seeds(tmp_path, count=2, epochs=2)
    for name in ("float32", "bf16"):
        assert len(set(result[name]["losses"])) == 2 and 0 < result[name]["mean"] < 16
    assert 0 < result["difference"] < 0.1
