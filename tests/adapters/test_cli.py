"""`reft-serve adapter`, as a person or a script meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from reft_serve.adapters.directory import read_adapter
from reft_serve.cli.app import app
from tests.support.adapters.damage import write_good
from tests.support.adapters.saves import LLAMA, named
from tests.support.paths import ROOT

UNTIED = ["--positions", "f5+l5", "--untied"]


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, ["adapter", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def import_save(case: str, out: Path, *flags: str) -> Result:
    return run("import", named(case).path, "--base", LLAMA, "--out", out, *flags)


def test_help_needs_no_torch() -> None:
    without = "import sys; sys.modules['torch'] = None; from reft_serve.cli.app import main; main()"
    for words in (
        ["--help"],
        ["adapter", "--help"],
        ["adapter", "import", "--help"],
        ["train", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", without, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Usage" in done.stdout


def test_import_publishes_and_says_the_digest(tmp_path: Path) -> None:
    result = import_save("loreft_f5l5", tmp_path / "a", *UNTIED)
    assert result.exit_code == 0
    adapter = read_adapter(tmp_path / "a")
    assert (
        result.stdout
        == f"{tmp_path / 'a'}: 4 interventions, 2064 parameters, sha256 {adapter.digest}\n"
    )
    assert result.stderr == ""
    assert not adapter.manifest.positions.tied


def test_every_flag_reaches_the_adapter(tmp_path: Path) -> None:
    flags = [
        "--positions",
        "l2",
        "--last-offset",
        "1",
        "--activation",
        "tanh",
        "--phase",
        "all",
        "--kind",
        "noreft",
    ]
    assert import_save("noreft_nobias_l1", tmp_path / "a", *flags, "--no-bias").exit_code == 0
    manifest = read_adapter(tmp_path / "a").manifest
    rule = manifest.positions
    assert (rule.spec, rule.last_offset, rule.phase) == ("l2", 1, "all")
    assert manifest.interventions[0].activation == "tanh"


def test_a_checkpoint_is_imported_with_its_kind(tmp_path: Path) -> None:
    flags = ["--positions", "f2+l2", "--untied", "--kind", "loreft"]
    assert import_save("trained_ckpt_f2l2", tmp_path / "a", *flags).exit_code == 0


def test_warnings_go_to_stderr(tmp_path: Path) -> None:
    result = import_save("loreft_f5l5", tmp_path / "a", "--positions", "f5+l5")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: its second half repeats")


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (
            ["import", named("loreft_l1").path, "--base", LLAMA, "--out", "{tmp}/a"],
            "give --positions",
        ),
        (["import", "{tmp}/none", "--base", LLAMA, "--out", "{tmp}/a"], "there is no directory at"),
        (["import", "{tmp}", "--base", LLAMA, "--out", "{tmp}/a"], "unknown format: looked for"),
        (["import", LLAMA, "--base", LLAMA, "--out", "{tmp}/a"], "unknown format: looked for"),
        (
            ["import", named("loreft_l1").path, "--base", "{tmp}", "--out", "{tmp}/a"],
            "holds no config.json",
        ),
        (
            [
                *(
                    "import",
                    named("loreft_cls").path,
                    "--base",
                    LLAMA,
                    "--out",
                    "{tmp}/a",
                    "--positions",
                    "f1",
                ),
                *("--labels", "yes,no"),
            ],
            "--labels names 2, but the head has 3 outputs",
        ),
        (
            ["import", "{tmp}/good", "--base", LLAMA, "--out", "{tmp}/a", "--positions", "f1"],
            "records everything",
        ),
        (["import", "{tmp}/good", "--base", LLAMA, "--out", "{tmp}/good"], "already exists"),
        (["export", "{tmp}/good", "--out", "{tmp}/good"], "already exists"),
        (
            ["export", "{tmp}/good", "--out", "{tmp}/a", "--format", "peft"],
            "'peft' is not supported",
        ),
        (
            ["export", "{tmp}/good", "--out", "{tmp}/good/reft_config.json/a"],
            "good/reft_config.json: File exists",
        ),
        (["inspect", "{tmp}/none"], "there is no adapter directory"),
        (["check", "{tmp}"], "holds no reft_config.json"),
        (["check", "{tmp}/good", "--base", "{tmp}/none"], "is not a directory"),
    ],
)
def test_a_mistake_gets_one_sentence_on_stderr_and_exit_code_1(
    tmp_path: Path, words: list[str | Path], phrase: str
) -> None:
    write_good(tmp_path / "good")
    result = run(*(str(word).format(tmp=tmp_path) for word in words))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert phrase in result.stderr
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_ours_is_copied_after_the_checks(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good")
    assert (
        run("import", tmp_path / "good", "--base", LLAMA, "--out", tmp_path / "copy").exit_code == 0
    )
    assert read_adapter(tmp_path / "copy").digest == good.digest
    other = LLAMA.parent / "tiny-gpt2"
    result = run("import", tmp_path / "good", "--base", other, "--out", tmp_path / "a")
    assert (
        "it was trained on a LlamaForCausalLM and the base model is a GPT2LMHeadModel"
        in result.stderr
    )


def test_export_tells_what_pyreft_does_not_record(tmp_path: Path) -> None:
    import_save("loreft_f5l5", tmp_path / "a", *UNTIED)
    result = run("export", tmp_path / "a", "--out", tmp_path / "b", "--format", "pyreft")
    assert "--positions=f5+l5 --untied" in result.stdout
    back: list[str | Path] = ["--base", LLAMA, "--out", tmp_path / "c", *UNTIED]
    assert run("import", tmp_path / "b", *back).exit_code == 0
    assert read_adapter(tmp_path / "c").digest == read_adapter(tmp_path / "a").digest


def test_inspect_as_json_holds_the_manifest_and_the_sizes(tmp_path: Path) -> None:
    good = write_good(tmp_path / "good")
    shown = json.loads(run("inspect", tmp_path / "good", "--json").stdout)
    assert shown["digest"] == good.digest
    assert shown["bytes"] == (tmp_path / "good" / "reft_model.safetensors").stat().st_size
    assert shown["parameters"] == 2 * 4 * 64 + 4 + 2 * 4 * 64 + 8
    assert shown["positions"]["spec"] == "f2+l2"
    assert [row["kind"] for row in shown["interventions"]] == ["loreft", "noreft"]
    assert shown["warnings"] == []


def test_inspect_shows_a_table_and_draws_no_markup_of_the_adapters(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    file = tmp_path / "good" / "reft_config.json"
    file.write_text(file.read_text().replace('"tiny-llama"', '"[red]tiny[/red]"'))
    shown = run("inspect", tmp_path / "good").stdout
    for word in (
        "[red]tiny[/red]: LlamaForCausalLM",
        "loreft",
        "noreft",
        "mlp_output",
        "f2+l2, tied",
        "relu",
    ):
        assert word in shown


def test_the_rank_limit_counts_what_the_engine_holds(tmp_path: Path) -> None:
    write_good(tmp_path / "good")
    assert run("check", tmp_path / "good", "--max-rank", "8").exit_code == 0
    result = run("check", tmp_path / "good", "--max-rank", "7")
    assert result.exit_code == 1
    assert (
        "needs rank 8 (twice its rank, for the activation relu) and this engine supports 7"
        in result.stdout
    )
