from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_export.calibrate.streaming.offload import Buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("in_file", [False, True])
def test_rows_come_back_as_written(tmp_path: Path, dtype: torch.dtype, in_file: bool) -> None:
    path = tmp_path / "rows" if in_file else None
    rows = torch.arange(60).reshape(5, 3, 4).to(dtype)
    with Buffer(5, (3, 4), dtype, path=path) as buffer:
        buffer.write(3, rows[3:])
        buffer.write(0, rows[:3])
        assert torch.equal(buffer.read(0, 5), rows)
        assert torch.equal(buffer.read(2, 4), rows[2:4])
        assert buffer.nbytes == rows.nbytes


@pytest.mark.parametrize("in_file", [False, True])
def test_heads_are_the_first_entries_of_rows(tmp_path: Path, in_file: bool) -> None:
    path = tmp_path / "rows" if in_file else None
    with Buffer(5, (4, 3), torch.float32, path=path) as buffer:
        rows = torch.randn(5, 4, 3)
        buffer.write(0, rows)
        assert torch.equal(buffer.prefixes(1, 4, 2), rows[1:4, :2])
        assert torch.equal(buffer.prefixes(0, 5, 9), rows)


def test_a_file_keeps_its_rows_after_it_is_closed(tmp_path: Path) -> None:
    rows = torch.randn(4, 2)
    with Buffer(4, (2,), torch.float32, path=tmp_path / "rows") as buffer:
        buffer.write(0, rows)
    with Buffer(4, (2,), torch.float32, path=tmp_path / "rows") as buffer:
        assert torch.equal(buffer.read(0, 4), rows)


def test_memory_is_saved_and_restored(tmp_path: Path) -> None:
    rows = torch.randn(4, 2).to(torch.bfloat16)
    with Buffer(4, (2,), torch.bfloat16) as buffer:
        buffer.write(0, rows)
        buffer.save(tmp_path / "saved")
    with Buffer(4, (2,), torch.bfloat16) as buffer:
        buffer.restore(tmp_path / "saved")
        assert torch.equal(buffer.read(0, 4), rows)


def test_rows_of_another_dtype_are_cast(tmp_path: Path) -> None:
    with Buffer(2, (2,), torch.float32, path=tmp_path / "rows") as buffer:
        buffer.write(0, torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16).T)
        assert buffer.read(0, 2).tolist() == [[1, 3], [2, 4]]
