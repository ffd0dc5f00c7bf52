"""FLEET.toml: what a fleet is made of, and every mistake in it with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from lora_export.errors import InputRefused, LoraExportError
from lora_export.fleet.description import read_fleet
from support.fleets import BASES, FLEET, JOBS, MERGE, VERIFY


def described(folder: Path, text: str = FLEET) -> list[object]:
    (folder / "fleet.toml").write_text(text)
    return list(read_fleet(Path("fleet.toml")).jobs)


def test_each_adapter_goes_through_the_steps(place: Path) -> None:
    jobs = described(place)
    assert [job.id for job in jobs] == JOBS
    assert jobs[1].values == {"candidate": "release/de"} and jobs[1].after == ("base/de/1-merge",)
    assert jobs[0].fixed() == {"base": "base", "adapters": "adapters/de"}
    assert read_fleet(Path("fleet.toml")).records == Path("fleet.records")


def test_names_stand_in_every_text_of_a_step(place: Path) -> None:
    step = '[[steps]]\nstep = "verify"\nmodel = "{base_path}"\ncandidate = "x/{base}"\nreport = ["{adapter}.json"]\n'
    first = described(place, BASES + step)[0]
    assert first.values == {"model": "base", "candidate": "x/base", "report": ["de.json"]}
    assert first.fixed() == {"adapters": "adapters/de"} and first.after == ()


def test_a_convert_step_has_the_adapter_alone(place: Path) -> None:
    steps = MERGE + '[[steps]]\nstep = "convert"\nto = "mlx"\noutput = "mlx/{adapter}"\n' + VERIFY
    jobs = described(place, BASES + steps)
    assert jobs[1].fixed() == {"adapter": "adapters/de"}
    assert jobs[2].values["candidate"] == "release/de"  # not the adapter of the step before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[bases]]", "[[bases", "is not valid TOML"),
        (BASES, "", "fleet.toml: there is no [[bases]]"),
        ("[[steps]]", "[[stepps]]", "fleet.toml: there is no key `stepps`; the nearest is `steps`"),
        ('"adapters/*"', '"nothing/*"', "[[bases]] 1: 'nothing/*' matches no adapter"),
        ('"adapters/*"', '"hf://org/*"', "hf://org/*: globs are for the disk and for stores. List the addresses"),
        ('["adapters/*"]', '"adapters/*"', "[[bases]] 1: `adapters` is 'adapters/*'; it must be a list of texts"),
        ('["adapters/*"]', "[]", "[[bases]] 1: `adapters` is []; it must be a list of texts"),
        ('path = "base"', "", "[[bases]] 1: the key `path` is missing"),
        (BASES, BASES + 'name = "../up"\n', "[[bases]] 1: '../up' is no name of a folder. State another `name`"),
        ('"verify --base"', '"prove"', "[[steps]] 2: there is no step 'prove'. The steps are: merge, onnx"),
        ("release/{adapter}", "release/{name}", "[[steps]] 1: {name} is no name of a fleet. The names are: {adapter}"),
        ("release/{adapter}", "release", "several jobs write one output. Put {adapter}, {base} or a step's name into:"),
        ('output = "', 'outputt = "', "[[steps]] 1 (merge): there is no key `outputt`; the nearest is `output`"),
        (MERGE, MERGE + "min-retention = true\n", "`min-retention` is True; it must be a number"),
        (MERGE, MERGE.replace('"release/{adapter}"', "3"), "[[steps]] 1 (merge): `output` is 3; it must be text"),
        (VERIFY, VERIFY + "candidate = 3\n", "(verify --base): `candidate` is 3; it must be text"),
        (MERGE, MERGE + "min-retention = 2\n", "[[steps]] 1 (merge): `min-retention` is 2; it must be at least 0"),
        (MERGE, MERGE + 'dtype = "float8"\n', "`dtype` is 'float8'; it must be one of keep, float32"),
        (MERGE, MERGE + "dry-run = true\n", "[[steps]] 1 (merge): there is no key `dry-run`"),
        (VERIFY, VERIFY + 'adapter = ["adapters/fr"]\n', "[[steps]] 2 (verify --base): there is no key `adapter`"),
        (VERIFY, VERIFY + 'candidate = "http://x/v1"\n', "http://x/v1 is a server, whose answers are in no file"),
        (MERGE, "", "[[steps]] 1: no step before it writes a model: give `candidate`"),
        ('adapters = ["adapters/*"]', 'adapters = ["adapters/*", "./adapters/fr"]', "several adapters have one name"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(old: str, new: str, message: str, place: Path) -> None:
    with pytest.raises(LoraExportError) as refused:
        described(place, FLEET.replace(old, new, 1))
    assert message in str(refused.value) and refused.value.exit_code in (2, 3)


def test_a_file_that_is_not_there_has_a_similar_name(place: Path) -> None:
    with pytest.raises(InputRefused, match=r"no file of a fleet at flet\.toml; a similar name there is fleet\.toml$"):
        read_fleet(Path("flet.toml"))
    for named in (lambda: le.inspect("bsae"), lambda: le.verify("base", "bsae")):
        with pytest.raises(InputRefused, match=r"; a similar name there is base$"):
            named()
