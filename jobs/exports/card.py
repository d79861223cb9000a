"""The card of a dataset on the Hugging Face hub: where its files are, and the facts of the job that made it."""

from __future__ import annotations

from typing import Any

import yaml

from latentmill.jobs.exports.format import Written

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
_LARGEST = "100M<n<1B"
_HUB_LICENSES = {
    "apache-2.0": "apache-2.0",
    "creativeml-openrail-m": "creativeml-openrail-m",
    "creativeml-openrail++-m": "openrail++",
    "mit": "mit",
}
"""Names of licenses that presets give, and the hub's own for them."""


def dataset_card(written: Written) -> str:
    """Front matter that the hub and the library `datasets` read, then facts for people."""
    front = yaml.safe_dump(_front_matter(written), sort_keys=False, allow_unicode=True)
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(written).items())
    return f"---\n{front}---\n\n# Pictures made by a model\n\n{_ABOUT}\n\n{facts}\n"


_ABOUT = (
    "Every picture here was made by the text-to-image model below, from the prompt in its row, by latentmill. Each\n"
    "row holds all that it takes to make its picture again. `sha256` is the digest of the picture as it was made,\n"
    "`exported_sha256` of the picture as it is here; `_export/` holds the digest of each file."
)


def _front_matter(written: Written) -> dict[str, Any]:
    splits, rows = written.files_by_split(), written.rows_by_split()
    total = sum(rows.values())
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    sizes = [
        {"name": split, "num_bytes": sum(file.bytes for file in splits[split]), "num_examples": count}
        for split, count in rows.items()
    ]
    license_ = written.plan.license
    return {
        **({} if license_ is None else _license(license_)),
        "task_categories": ["text-to-image"],
        "annotations_creators": ["machine-generated"],
        "tags": ["synthetic", "latentmill"],
        "size_categories": [next((name for limit, name in _SIZES if total < limit), _LARGEST)],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {
            "splits": sizes,
            "download_size": sum(size["num_bytes"] for size in sizes),
            "dataset_size": sum(size["num_bytes"] for size in sizes),
        },
    }


def _license(name: str) -> dict[str, str]:
    """As the hub has it, which takes a name that it does not know only beside `other`."""
    slug = "-".join(name.lower().split())
    if slug in _HUB_LICENSES:
        return {"license": _HUB_LICENSES[slug]}
    return {
        "license": "other",
        "license_name": "".join(letter for letter in slug if letter.isalnum() or letter in "-."),
    }


def _facts(written: Written) -> dict[str, str]:
    plan, publication, rows = written.plan, written.publication, written.rows_by_split()
    settings = plan.settings
    usable = [model for model in plan.models if model.fault is None]
    models = (
        f"{_code(model.name)} ({_code(model.family)}), sha256 of its files {_code(model.digest)}, license "
        + (_code(model.license) if model.license else "not known here")
        for model in usable
    )
    changed = {"LoRAs": ", ".join(map(_code, plan.model.loras))} if plan.model.loras else {}
    counts = ", ".join(f"{count:,} {status}" for status, count in publication.counts.items())
    options = {name: value for name, value in written.options.items() if value is not None and name != "to"}
    marked = settings.watermark != "none"
    return {
        "pictures": ", ".join(f"{count:,} in {_code(split)}" for split, count in rows.items()),
        "model" if len(usable) == 1 else "models": "; ".join(models),
        **changed,
        "licenses": "those of the weights; whether they bind these pictures is for their user to find out",
        "job": f"{publication.rows:,} samples of {plan.n_rows:,} prompts: {counts}",
        "safety checker": f"{_code(settings.safety)}; pictures that it flagged: {_code(settings.on_flagged)}",
        "marking": f"invisible watermark {_code(settings.watermark_text)} by {_code(settings.watermark)}"
        if marked
        else "no invisible watermark",
        "content credentials": "none"
        if written.signing is None
        else f"C2PA, each picture signed; sha256 of the certificate {_code(written.signing['certificate_sha256'])}",
        "export": ", ".join(f"{name} {_code(value)}" for name, value in options.items()),
        "plan hash": _code(plan.plan_hash),
    }


def _code(value: object) -> str:
    """A value that nothing is read into, in one line."""
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"
