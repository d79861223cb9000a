"""The measured table of docs/models.md: it has every family, and its command still measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from tests.engine import measured
from tests.engine.families import requests


def test_the_page_has_a_row_for_every_case():
    ((_, table, _),) = measured._PART.findall(measured.PAGE.read_text(encoding="utf-8"))
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    asked = [(case.name, case.weights, str(case.rows[0].num_inference_steps)) for case in measured.cases()]
    assert [tuple(line[:3]) for line in cells] == asked


def test_a_case_is_measured_and_a_difference_is_seen(tmp_path: Path):
    case = dataclasses.replace(measured.cases()[0], rows=requests(32, steps=2))
    found = measured.measure(case, tmp_path / "model")
    assert found.levels <= 1
    assert found.differing < 0.001
    assert found.latents < 1e-5
    other = dataclasses.replace(case, reference=lambda folder, rows: 255 - case.reference(folder, rows))
    assert measured.measure(other, tmp_path / "model").levels > 1


def test_what_is_given_to_a_decoder_is_kept_and_the_decoder_as_it_was():
    class Decoder:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents + 1

    kept: list[torch.Tensor] = []
    decoder = Decoder()
    for watched in (decoder, Decoder):
        with measured.noted(watched, kept):
            assert decoder.decode(torch.zeros(1)) == 1
    decoder.decode(torch.zeros(1))
    assert kept == [torch.zeros(1), torch.zeros(1)]
    assert "decode" not in vars(decoder)
