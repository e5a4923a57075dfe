"""The launch table."""

import pytest
import torch

from smtc.kernels import launching, tuning


@pytest.mark.parametrize(
    ("device", "rows"),
    [("sm_80", 80), ("sm_89", 80), ("sm_90", 90), ("sm_100", 100), ("sm_103", 100), ("sm_120", 80)],
)
def test_an_architecture_without_rows_uses_an_older_one_s(device, rows, monkeypatch):
    table = {
        "kernel": [
            tuning.Row(f"sm_{number}", 16, tuning.ANY, {"found": number})
            for number in (80, 90, 100)
        ]
    }
    monkeypatch.setattr(tuning, "TABLE", table)
    with launching.recording(device):
        assert tuning.options("kernel", torch.empty(1, dtype=torch.bfloat16), 5) == {"found": rows}


def test_the_first_bucket_that_is_large_enough_counts(monkeypatch):
    rows = [tuning.Row("sm_80", 32, size, {"found": size}) for size in (256, 1024)]
    monkeypatch.setattr(tuning, "TABLE", {"kernel": rows})
    with launching.recording("sm_80"):
        for size, found in ((1, 256), (256, 256), (257, 1024)):
            assert tuning.options("kernel", torch.empty(1), size) == {"found": found}
        with pytest.raises(LookupError, match="no row for kernel, sm_80, 32 bits, 1025"):
            tuning.options("kernel", torch.empty(1), 1025)


@pytest.mark.parametrize("kernel", tuning.TABLE)
def test_every_kernel_has_options_for_every_size(kernel):
    for device in ("sm_80", "sm_90", "sm_100"):
        with launching.recording(device):
            for dtype in (torch.bfloat16, torch.float32):
                for size in (1, 256, 1500, 10**6):
                    try:
                        chosen = tuning.options(kernel, torch.empty(1, dtype=dtype), size)
                    except LookupError as error:
                        # Matrices of one kind of element only.
                        assert "16 bits" in str(error) and dtype == torch.bfloat16
                        continue
                    chosen["changed"] = 1  # and the table is not
                    assert "changed" not in tuning.options(
                        kernel, torch.empty(1, dtype=dtype), size
                    )
