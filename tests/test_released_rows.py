"""The authors' training data for VerifyRM: parquet of question, reference_answer, completion and label."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest

from cooper_jax.data import labelled_completions

COLUMNS = {
    "question": ["What is 1/2 + 1/2?", "What is 6 x 7?"],
    "reference_answer": ["1", "$42$"],
    "completion": ["Two halves:\n\\boxed{1}", "It is 41."],
    "label": [1, 0],
}


@pytest.mark.parametrize("kind", [pyarrow.int64(), pyarrow.int8(), pyarrow.bool_(), pyarrow.float64()])
def test_rows_of_the_released_file_are_read(tmp_path, kind):
    """Whatever type its writer gave the labels, and beside an index column, which is ignored."""
    path = tmp_path / "VerifyRM_training_data.parquet"
    label = pyarrow.array(COLUMNS["label"]).cast(kind)
    table = pyarrow.table(COLUMNS | {"label": label, "__index_level_0__": [7, 9]})
    pyarrow.parquet.write_table(table, path)
    first, second = labelled_completions.load_labelled_completions(str(path))
    assert (first.question, first.reference, first.completion) == (
        "What is 1/2 + 1/2?",
        "1",
        COLUMNS["completion"][0],
    )
    assert (second.reference, first.label, second.label) == ("42", 1.0, 0.0)


def test_a_row_without_a_reference_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS | {"reference_answer": ["1", ""]}), path)
    with pytest.raises(ValueError, match=r"rows\.parquet: row 2: the reference_answer is empty"):
        labelled_completions.load_labelled_completions(str(path))
