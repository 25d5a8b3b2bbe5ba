"""What cannot be converted is refused, with an error that says what is wrong and nothing left
behind; what is written, reported and verified.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import interruptible

from conversion import convert_mesh_tf, model_folder, verify
from conversion.convert_mesh_tf import convert
from tests.mesh_tf_reference import MeshModel, both
from tests.test_conversion_models import reference_outputs, write_checkpoint
from tests.tf_bundle import write_bundle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def command(capsys, checkpoint, output, *options):
    """Exit code and what was written to standard error."""
    code = convert_mesh_tf.main(
        ["--checkpoint", str(checkpoint), "--output", str(output), *options]
    )
    return code, capsys.readouterr().err


def edit_gin(checkpoint, old, new):
    path = checkpoint / "operative_config.gin"
    text, count = re.subn(old, new, path.read_text())
    assert count, old
    path.write_text(text)


def rewrite(checkpoint, change):
    """Write the checkpoint anew, its variables changed by `change(variables)`."""
    variables = MeshModel().random_variables()
    change(variables)
    write_bundle(checkpoint / "model.ckpt-1000", variables)


# --- what cannot be converted ---------------------------------------------------------------------


def damage(folder, name, at=None, keep=None):
    path = folder / f"model.ckpt-1000.{name}"
    data = bytearray(path.read_bytes())
    if at is not None:
        data[at] ^= 1
    path.write_bytes(data[:keep])


CONV = "encoder/block_000/layer_000/LocalConvAttnBlock"
FIRST_DATA = "data-00000-of-00002"
BROKEN = {
    "index cut off": (lambda c: damage(c, "index", keep=100), r"\.index: at offset 92 "),
    "index empty": (lambda c: damage(c, "index", keep=0), r"\.index: at offset 0 "),
    "index damaged": (lambda c: damage(c, "index", at=40), r"\.index: the block at offsets 0 to"),
    "index missing": (lambda c: (c / "model.ckpt-1000.index").unlink(), r"no model.ckpt-1000.ind"),
    "data cut off": (
        lambda c: damage(c, FIRST_DATA, keep=100),
        r"data-00000-of-00002: is cut off at byte 100",
    ),
    "data damaged": (
        lambda c: damage(c, FIRST_DATA, at=50),
        r"data-00000-of-00002: bytes \d+ to \d+ \(.+\) do not match their checksum",
    ),
    "a slot damaged": (
        lambda c: damage(c, FIRST_DATA, at=-3),
        r"data-00000-of-00002: bytes \d+ to \d+ \(.+_slot_v\) do not match their checksum",
    ),
    "data missing": (
        lambda c: (c / f"model.ckpt-1000.{FIRST_DATA}").unlink(),
        r"these are missing: model.ckpt-1000.data-00000-of-00002",
    ),
    "two unclaimed variables": (
        lambda c: rewrite(c, lambda v: v.update({"a": v[f"{CONV}/local_conv_inp_0/bias"],
                                                 "b_slot_v": v[f"{CONV}/local_conv_inp_0/bias"]})),
        r"unclaimed: a \(16,\)\n.*unclaimed: b_slot_v \(16,\)",
    ),
    "two missing variables": (
        lambda c: rewrite(c, lambda v: (v.pop(f"{CONV}/local_conv_inp_1/kernel"),
                                        v.pop("decoder/rms_norm/scale"))),
        rf"missing: {CONV}/local_conv_inp_1/kernel \(16, 16\)\n.*missing: decoder/rms_norm/scale",
    ),
    "no embedding": (
        lambda c: rewrite(c, lambda v: v.pop("shared/embedding")), r"missing: shared/embedding"
    ),
    "a tap missing": (
        lambda c: rewrite(c, lambda v: v.pop(f"{CONV}/lightwt_depthwise_dense_8/kernel")),
        rf"missing: {CONV}/lightwt_depthwise_dense_8/kernel",
    ),
    "a layer missing": (
        lambda c: rewrite(c, lambda v: [v.pop(n) for n in list(v) if "block_000/layer_001" in n]),
        r"no variables of layer 1 of block 0",
    ),
    "wrong shapes": (
        lambda c: rewrite(c, lambda v: v.update(
            {f"{CONV}/local_conv_inp_0/bias": np.zeros(3, np.float32),
             "decoder/block_001/layer_002/DenseReluDense/wo/kernel": np.zeros((24, 8), np.float32)}
        )),
        r"wo/kernel is \(24, 8\), expected \(24, 16\).*inp_0/bias is \(3,\), expected \(16,\)",
    ),
    "a dtype": (
        lambda c: rewrite(c, lambda v: v.update({"encoder/rms_norm/scale": np.ones(16, np.int32)})),
        r"wrong dtype: encoder/rms_norm/scale is int32",
    ),
    "an unknown sublayer": (
        lambda c: rewrite(c, lambda v: v.update(
            {"encoder/block_002/layer_000/LocalSelfAttention/q": np.zeros((2, 2), np.float32)})),
        r"unclaimed: encoder/block_002/layer_000/LocalSelfAttention/q",
    ),
    "sublayers in another order": (
        lambda c: write_checkpoint(
            c, MeshModel(block={"encoder": ["mlp", "conv"], "decoder": ["conv", "cross", "mlp"]})),
        r"The encoder's sublayers are DenseReluDense, LocalConvAttnBlock",
    ),
    "no cross-attention": (
        lambda c: write_checkpoint(c, MeshModel(block=both(["conv", "mlp"]))),
        r"The decoder has no EncDecAttention",
    ),
    "no decoder": (
        lambda c: rewrite(c, lambda v: [v.pop(n) for n in list(v) if n.startswith("decoder/")]),
        r"no variables decoder/.../layer_NNN/",
    ),
    "gin says another d_model": (
        lambda c: edit_gin(c, "d_model = 16", "d_model = 32"),
        r"d_model: the variables say 16, operative_config.gin says 32",
    ),
    "gin says another d_ff": (
        lambda c: edit_gin(c, "d_ff = 24", "d_ff = 25"),
        r"d_ff: the variables say 24, operative_config.gin says 25",
    ),
    "gin says other heads": (
        lambda c: edit_gin(c, "num_heads = 2", "num_heads = 3"),
        r"num_heads \* d_kv = 12; .* says num_heads = 3; .* says key_value_size = 6",
    ),
    "gin says another depth": (
        lambda c: edit_gin(c, "num_layers = 2", "num_layers = 4"),
        r"number of blocks: the variables say 2, operative_config.gin says 4",
    ),
    "gin says another window": (
        lambda c: edit_gin(c, "min_relative_pos = -4", "min_relative_pos = -3"),
        r"encoder's kernel size: the variables say 9, .* says positions -3 to 4",
    ),
    "gin says no window": (
        lambda c: edit_gin(c, "encoder/LocalConvAttnBlock.min_relative_pos = -4\n", ""),
        r"encoder's window: operative_config.gin does not set LocalConvAttnBlock.min_relative_pos",
    ),
    "gin says another kind": (
        lambda c: edit_gin(c, "'lightweight_conv'", "'dynamic_conv'"),
        r"attention_type: the variables say lightweight_conv, .* says dynamic_conv",
    ),
    "gin says other repeats": (
        lambda c: edit_gin(c, "Conv1DLocalAttn.num_unique_depth_filters = 1",
                           "Conv1DLocalAttn.num_unique_depth_filters = 2"),
        r"num_unique_depth_filters: the variables say 1, .* says 2",
    ),
    "gin says other layers": (
        lambda c: edit_gin(c, "@transformer_layers.EncDecAttention,\n", ""),
        r"decoder's layers: the variables say \['LocalConvAttnBlock', 'EncDecAttention'",
    ),
    "gin says untied": (
        lambda c: edit_gin(c, "softmax_weights = True", "softmax_weights = False"),
        r"shared_embedding_and_softmax_weights: the variables say True, .* says False",
    ),
    "gin says two tables": (
        lambda c: edit_gin(c, "shared_embedding = True", "shared_embedding = False"),
        r"shared_embedding: the variables say True, .* says False",
    ),
    "gin says another length": (
        lambda c: edit_gin(c, "max_length = 32", "max_length = 512"),
        r"max_length: the variables say 32, .* says 512",
    ),
    "gin says biases": (
        lambda c: edit_gin(c, "use_bias = False", "use_bias = True"),
        r"use_bias: the variables say False, .* says True",
    ),
    "gin says gated": (
        lambda c: edit_gin(c, "DenseReluDense.activation = 'relu'",
                           "DenseReluDense.activation = ['gelu', 'linear']"),
        r"DenseReluDense.activation: the variables say one activation \(wi\), the gin file \['gel",
    ),
    "gin has an unknown activation": (
        lambda c: edit_gin(c, "LocalConvAttnBlock.activation = 'linear'",
                           "LocalConvAttnBlock.activation = 'softplus'"),
        r"LocalConvAttnBlock.activation is 'softplus', expected one of 'relu'",
    ),
    "gin lets the decoder look ahead": (
        lambda c: edit_gin(c, "(decoder.*)min_relative_pos = -8\n(decoder.*)max_relative_pos = 0",
                           r"\1min_relative_pos = -7\n\2max_relative_pos = 1"),
        r"decoder's window: positions -7 to 1, expected",
    ),
    "gin scales units": (
        lambda c: edit_gin(c, "convention.value = False", "convention.value = True"),
        r"unit_scaling_convention.value = True in operative_config.gin, expected",
    ),
    "gin scales scores": (
        lambda c: edit_gin(c, "initializer = True", "initializer = False"),
        r"SelfAttention.fold_scaling_into_initializer = False in operative_config.gin, expected",
    ),
    "gin has other sublayers": (
        lambda c: edit_gin(c, "@transformer.sublayer_residual", "@transformer.sublayer_rezero"),
        r"LayerStack.sublayers_per_layer = \['sublayer_rms_norm', .*sublayer_rezero'\] in",
    ),
    "gin cut off": (
        lambda c: (c / "operative_config.gin").write_text("x.y = [1,"), r"the statement .* not end"
    ),
    "gin not a text": (
        lambda c: (c / "operative_config.gin").write_bytes(b"\xff\xfe\x00"), r"is not a text file"
    ),
    "no gin, so no heads": (
        lambda c: (c / "operative_config.gin").unlink(), r"num_heads \* d_kv = 12, .*--num_heads"
    ),
    "a path out of the folder": (
        lambda c: (c / "checkpoint").write_text('model_checkpoint_path: "../x/model.ckpt-1"'),
        r"names '../x/model.ckpt-1', expected a name in the same folder",
    ),
    "a link out of the folder": (
        lambda c: ((c / f"model.ckpt-1000.{FIRST_DATA}").rename(c.parent / "elsewhere"),
                   (c / f"model.ckpt-1000.{FIRST_DATA}").symlink_to(c.parent / "elsewhere")),
        r"data-00000-of-00002: is a link that leads out of its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_and_leaves_nothing_behind(
    name, checkpoint, tmp_path, capsys
):
    do_damage, said = BROKEN[name]
    do_damage(checkpoint)
    before = sorted(tmp_path.iterdir())
    code, error = command(capsys, checkpoint, tmp_path / "model")
    assert code == 2
    assert re.search(said, error, flags=re.DOTALL), error
    assert sorted(tmp_path.iterdir()) == before


def test_all_disagreements_are_shown_at_once(checkpoint, tmp_path, capsys):
    edit_gin(checkpoint, "d_model = 16", "d_model = 32")
    edit_gin(checkpoint, "max_length = 32", "max_length = 512")
    _, error = command(capsys, checkpoint, tmp_path / "model")
    # d_model, output_size and max_length, in both stacks.
    assert error.count("the variables say") == 6


def test_without_a_gin_file_the_number_of_heads_is_asked_for(checkpoint, tmp_path, capsys):
    convert(checkpoint, tmp_path / "with", progress=False)
    (checkpoint / "operative_config.gin").unlink()
    report = convert(checkpoint, tmp_path / "without", num_heads=2, progress=False)
    assert "assumed: the encoder's window of 9 taps: centred" in report
    files = [tmp_path / name / "model.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
    files = [tmp_path / name / "config.json" for name in ("with", "without")]
    assert files[0].read_text() == files[1].read_text()
    with pytest.raises(ValueError, match="--num_heads says num_heads = 5"):
        convert(checkpoint, tmp_path / "five", num_heads=5, progress=False)


def test_heads_that_the_caller_and_the_gin_file_state_differently(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="num_heads = 2.*--num_heads says num_heads = 3"):
        convert(checkpoint, tmp_path / "model", num_heads=3, progress=False)


# --- the output -----------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_told_otherwise(checkpoint, tmp_path, capsys):
    output = tmp_path / "model"
    output.mkdir()
    assert command(capsys, checkpoint, output)[0] == 0  # empty: nothing is lost
    (output / "notes.txt").write_text("mine")
    code, error = command(capsys, checkpoint, output)
    assert code == 2 and "is not empty" in error and "--overwrite" in error
    assert (output / "notes.txt").read_text() == "mine"
    assert command(capsys, checkpoint, output, "--overwrite")[0] == 0
    assert not (output / "notes.txt").exists() and (output / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_an_error_leaves_the_folder_that_was_to_be_replaced(checkpoint, tmp_path, capsys):
    output = tmp_path / "model"
    convert(checkpoint, output, progress=False)
    before = (output / "model.safetensors").read_bytes()
    damage(checkpoint, FIRST_DATA, at=50)
    assert command(capsys, checkpoint, output, "--overwrite")[0] == 2
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_what_is_read_and_folders_are_not_overwritten(checkpoint, tmp_path, capsys):
    code, error = command(capsys, checkpoint, checkpoint, "--overwrite")
    assert code == 2 and "which is read" in error
    code, error = command(capsys, checkpoint, tmp_path, "--overwrite")
    assert code == 2 and "so it is not replaced" in error
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    code, error = command(capsys, checkpoint, other, "--overwrite")
    assert code == 2 and "holds the folder deep" in error and (other / "deep").exists()


def test_an_output_that_cannot_be_a_folder(checkpoint, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file, file / "model"):
        code, error = command(capsys, checkpoint, output, "--overwrite")
        assert code == 2 and str(output) in error, error
    assert file.read_text() == ""


def test_a_disk_without_room_is_told_beforehand(checkpoint, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: usage)
    code, error = command(capsys, checkpoint, tmp_path / "model")
    assert code == 2 and re.search("0.00 GB free, the weights need", error)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_disk_that_fills_up_on_the_way(checkpoint, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "_values", fail)
    code, error = command(capsys, checkpoint, tmp_path / "model")
    assert code == 2 and "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_for_real(checkpoint, tmp_path, capsys, monkeypatch):
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *rest, **options: original(
            Path("/dev/full") if "w" in mode and self.suffix == ".safetensors" else self,
            mode, *rest, **options)
    )  # fmt: skip
    code, error = command(capsys, checkpoint, tmp_path / "model")
    assert code == 2 and "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(number, checkpoint, tmp_path):
    """The process stops in the middle of writing, when it says so, until the signal comes."""
    script = """
import sys, time
from conversion import convert_mesh_tf, model_folder
def wait(weight, dtype):
    print("writing", flush=True)
    time.sleep(600)
model_folder._values = wait
sys.exit(convert_mesh_tf.main(["--checkpoint", sys.argv[1], "--output", sys.argv[2]]))
"""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        interruptible([sys.executable, "-c", script, checkpoint, tmp_path / "model"]),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint, and what is being written
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: nothing was written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_numbers_too_large_for_float16(checkpoint, tmp_path, capsys):
    rewrite(checkpoint, lambda v: v["encoder/rms_norm/scale"].fill(1e6))
    code, error = command(capsys, checkpoint, tmp_path / "model", "--dtype", "float16")
    assert code == 2 and "encoder.final_norm.weight holds numbers beyond float16's" in error
    assert command(capsys, checkpoint, tmp_path / "model", "--dtype", "bfloat16")[0] == 0


def test_a_tokenizer_that_is_none(checkpoint, tmp_path, capsys):
    absent = tmp_path / "absent.model"
    code, error = command(capsys, checkpoint, tmp_path / "model", "--tokenizer", str(absent))
    assert code == 2 and f"{absent}: there is no such file" in error
    text = tmp_path / "text.model"
    text.write_text("not a SentencePiece model")
    code, error = command(capsys, checkpoint, tmp_path / "model", "--tokenizer", str(text))
    assert code == 2 and "is not a SentencePiece model" in error
    assert not (tmp_path / "model").exists()


def test_the_report_and_the_card_say_what_was_done(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "model", progress=False)
    model = MeshModel()
    assert f"from {len(model.shapes())} variables: {len(model.shapes())} in float32" in report
    assert "left out: 3 optimizer slots, 1 global_step" in report and "(step 1000)" in report
    card = (tmp_path / "model" / "README.md").read_text()
    assert "checkpoint/model.ckpt-1000" in card and "| step | 1000 |" in card
    for name in ("index", FIRST_DATA, "data-00001-of-00002"):
        digest = subprocess.run(
            ["sha256sum", f"model.ckpt-1000.{name}"], cwd=checkpoint, capture_output=True, text=True
        )
        assert digest.stdout.split()[0] in card
    assert str(tmp_path) not in card


def test_pushing_uploads_the_finished_folder(checkpoint, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repository, exist_ok):
            calls.append(repository)
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path):
            calls.append(sorted(path.name for path in Path(folder_path).iterdir()))

    monkeypatch.setattr(model_folder, "HfApi", Api)
    output = tmp_path / "model"
    assert command(capsys, checkpoint, output, "--push_to_hub", "me/it")[0] == 0
    assert calls == ["me/it", sorted(path.name for path in output.iterdir())]
    monkeypatch.setattr(Api, "create_repo", lambda *args, **options: 1 / 0)
    code, error = command(capsys, checkpoint, output, "--overwrite", "--push_to_hub", "me/it")
    assert code == 2 and "was written, not uploaded: division" in error


def test_help_names_options_and_exit_codes():
    for module in ("convert_mesh_tf", "verify"):
        result = subprocess.run(
            [sys.executable, "-m", f"conversion.{module}", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        assert result.returncode == 0 and "--checkpoint" in result.stdout
        assert "Exit codes: 0" in result.stdout


def only_the_file(monkeypatch):
    """As where neither Mesh-TensorFlow nor Flax is installed: Flax compiles each model anew."""
    monkeypatch.setattr(verify, "mesh_tensorflow_is_installed", lambda: False)
    monkeypatch.setattr(verify, "installed_frameworks", lambda: ["pytorch"])


# --- verification ---------------------------------------------------------------------------------


def test_verify_compares_with_a_reference_file(checkpoint, tmp_path, capsys, monkeypatch):
    only_the_file(monkeypatch)
    code, error = command(capsys, checkpoint, tmp_path / "model", "--verify")
    assert code == 2 and "there is nothing to compare with" in error
    outputs = reference_outputs(MeshModel(), MeshModel().random_variables())
    np.savez(checkpoint / "reference.npz", **outputs)
    assert command(capsys, checkpoint, tmp_path / "model", "--verify")[0] == 0
    assert "| checkpoint | reference.npz | pytorch |" in (tmp_path / "model/README.md").read_text()
    assert verify.main(["--checkpoint", str(checkpoint)]) == 0
    assert "| checkpoint | reference.npz | pytorch |" in capsys.readouterr().out
    assert verify.main(["--checkpoint", str(checkpoint), "--model", str(tmp_path / "model")]) == 0


def test_verify_finds_what_differs(checkpoint, tmp_path, capsys, monkeypatch):
    only_the_file(monkeypatch)
    outputs = reference_outputs(MeshModel(), MeshModel().random_variables())
    wrong = {
        "encoder_output": {"encoder_output": outputs["encoder_output"] + 2e-5},
        "logits": {"logits": outputs["logits"] + 2e-5},
        "incremental_logits": {"incremental_logits": outputs["incremental_logits"] * np.nan},
        "greedy_ids": {"greedy_ids": outputs["greedy_ids"] + (outputs["greedy_ids"] > 2)},
    }
    for name, change in wrong.items():
        np.savez(checkpoint / "reference.npz", **{**outputs, **change})
        code, error = command(capsys, checkpoint, tmp_path / "model", "--verify")
        assert code == 1 and "ABOVE" in error, name
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda o: o.pop("logits"), "lacks logits"),
        (lambda o: o.update(logits=o["logits"][:, :, :5]), "was made with another model"),
    ],
)
def test_a_reference_that_does_not_fit(change, said, checkpoint, capsys, monkeypatch):
    only_the_file(monkeypatch)
    outputs = reference_outputs(MeshModel(), MeshModel().random_variables())
    change(outputs)
    np.savez(checkpoint / "reference.npz", **outputs)
    assert verify.main(["--checkpoint", str(checkpoint)]) == 2
    assert said in capsys.readouterr().err
    (checkpoint / "reference.npz").write_bytes(b"no archive")
    assert verify.main(["--checkpoint", str(checkpoint)]) == 2
    assert "cannot be read" in capsys.readouterr().err
