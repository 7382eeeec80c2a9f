"""The documents agree with the data they are generated from."""

from pathlib import Path

import pytest

from targets import catalog, tables, truth

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_document_is_what_the_data_generate(name: str) -> None:
    """If this fails: python -m targets.tables docs"""
    assert (DOCS / name).read_text(encoding="utf-8") == tables.DOCUMENTS[name]()


def test_every_chip_has_a_line_and_this_machine_has_none() -> None:
    text = tables.target_table()
    chips = [(t, chip) for t in catalog.all_targets() if not t.is_this_machine for chip in t.chips]
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(chips) + 2
    assert all(chip.title in text for _, chip in chips)


def test_every_row_of_the_truth_table_is_printed_with_its_source() -> None:
    text = tables.truth_table()
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(truth.TABLE) + 2
    assert all(row.source in text for row in truth.TABLE)


def test_measurements_the_table_quotes_are_recorded() -> None:
    text = (DOCS / "measurements.md").read_text(encoding="utf-8")
    for figure in ("1.02x", "1.74 to 1.9x", "4.2 to 4.6x", "3.3x", "2.6x", "3.8x", "2.9x", "4.1x", "3.0x"):
        assert figure in text
    for _, chip in ((t, chip) for t in catalog.all_targets() for chip in t.chips):
        for fact in chip.facts.values():
            _, found, heading = fact.source.partition("docs/measurements.md: ")
            if found:
                assert f"## {heading.split(',')[0].capitalize() if heading[0].islower() else heading}" in text
