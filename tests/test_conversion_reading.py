"""Checksums, TensorFlow's checkpoint format and gin files: read exactly, or refused by name."""

import re

import numpy as np
import pytest

from conversion.crc32c import crc32c
from conversion.gin_config import GinConfig, GinError, Reference
from conversion.tf_checkpoint import Checkpoint, CheckpointError, find_checkpoint
from tests import tf_bundle
from tests.test_conversion_models import write_checkpoint
from tests.tf_bundle import write_bundle


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


# --- checksums ------------------------------------------------------------------------------------


def test_crc32c_of_known_texts():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283  # the check value of every CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 1000, 4099, 65_535, 65_536, 200_003])
def test_crc32c_equals_the_plain_loop(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert crc32c(data) == crc32c(data.tobytes()) == tf_bundle.crc32c(data.tobytes())


def test_crc32c_of_any_array_is_that_of_its_bytes():
    array = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)
    assert crc32c(array) == tf_bundle.crc32c(array.tobytes())
    assert crc32c(array[0, 0]) == tf_bundle.crc32c(array[0, 0].tobytes())


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_what_was_written_is_read(shards, tmp_path):
    rng = np.random.default_rng(0)
    values = {
        f"{kind}/x_{i}": np.asarray(rng.standard_normal(shape) * 50).astype(kind)
        for kind in tf_bundle.NUMBERS
        if kind != "bfloat16"
        for i, shape in enumerate([(), (1,), (3, 5), (2, 3, 4), (0, 4)])
    }
    narrow = rng.standard_normal((9, 4)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    values["narrow"] = narrow.view(np.float32)
    write_bundle(tmp_path / "x", values, bfloat16=("narrow",), shards=shards)
    checkpoint = Checkpoint(tmp_path / "x")
    assert sorted(checkpoint.variables) == sorted(values)
    for name, value in values.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype and found.shape == value.shape
        assert found.tobytes() == value.tobytes()
    assert checkpoint.variables["narrow"].dtype == "bfloat16"
    assert len(checkpoint.files) == 1 + shards


def test_the_step_is_in_the_name_or_in_the_variable(tmp_path):
    write_bundle(tmp_path / "model.ckpt-7", {"global_step": np.int64(9)})
    write_bundle(tmp_path / "model.ckpt", {"global_step": np.int64(9)})
    write_bundle(tmp_path / "bare", {"x": np.float32(1)})
    steps = [Checkpoint(tmp_path / name).step for name in ("model.ckpt-7", "model.ckpt", "bare")]
    assert steps == [7, 9, None]


def test_which_checkpoint_a_path_means(tmp_path):
    for step in (5, 30, 200):
        write_bundle(tmp_path / f"model.ckpt-{step}", {"x": np.float32(1)})
    assert find_checkpoint(tmp_path).name == "model.ckpt-200"  # not by the alphabet
    for path in ("model.ckpt-30", "model.ckpt-30.index", "model.ckpt-30.data-00001-of-00002"):
        assert find_checkpoint(tmp_path / path).name == "model.ckpt-30"
    (tmp_path / "model.ckpt-30.meta").write_bytes(b"")
    assert find_checkpoint(tmp_path / "model.ckpt-30.meta").name == "model.ckpt-30"
    state = tmp_path / "checkpoint"
    state.write_text('model_checkpoint_path: "model.ckpt-5"\n')
    assert find_checkpoint(tmp_path).name == "model.ckpt-5"
    state.write_text(f'model_checkpoint_path: "{tmp_path}/model.ckpt-30"\n')
    assert find_checkpoint(tmp_path).name == "model.ckpt-30"


def test_a_checkpoint_without_step_or_state_file(tmp_path):
    write_bundle(tmp_path / "model.ckpt", {"x": np.float32(1)})
    assert find_checkpoint(tmp_path).name == "model.ckpt"
    write_bundle(tmp_path / "other", {"x": np.float32(1)})
    with pytest.raises(CheckpointError, match=r"2 checkpoints without a step.*model.ckpt, other"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "has no line model_checkpoint_path"),
        ("\xff\x00 nonsense", "has no line model_checkpoint_path"),
        ('model_checkpoint_path: ""', "names ''"),
        ('model_checkpoint_path: ".."', "names '..'"),
        ('model_checkpoint_path: "../other/model.ckpt-1000"', "without a path"),
        ('model_checkpoint_path: "/etc/model.ckpt-1000"', "without a path"),
        ('model_checkpoint_path: "gs://bucket/model.ckpt-1000"', "without a path"),
        ('model_checkpoint_path: "C:\\\\model.ckpt-1000"', "without a path"),
        ('model_checkpoint_path: "model.ckpt-9"', "there is no model.ckpt-9.index"),
    ],
)
def test_a_state_file_that_names_no_checkpoint_of_its_folder(text, said, checkpoint):
    (checkpoint / "checkpoint").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        find_checkpoint(checkpoint)
    assert "model.ckpt-1000" in str(error.value)  # what there is


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path):
    write_bundle(tmp_path / "x", {f"layer_{i}": np.float32(i) for i in range(20)})
    path = tmp_path / "x.index"
    whole = path.read_bytes()
    padding = range(len(whole) - 48 + 6, len(whole) - 8)  # behind the footer's numbers
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        if at in padding:
            continue
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            Checkpoint(tmp_path / "x")


def test_an_index_cut_off_anywhere_is_named_with_an_offset(tmp_path):
    write_bundle(tmp_path / "x", {f"layer_{i}": np.float32(i) for i in range(20)})
    path = tmp_path / "x.index"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.index: at offset \d+"):
            Checkpoint(tmp_path / "x")


def test_a_forged_index_with_good_checksums_raises_nothing_but_its_own_error(tmp_path):
    """Checksums keep accidents out, not malice: sizes are checked before they are believed."""
    rng = np.random.default_rng(0)
    write_bundle(tmp_path / "x", {f"layer_{i}": np.ones(4, np.float32) for i in range(8)})
    path = tmp_path / "x.index"
    entries = {b"": tf_bundle.field(1, 2)}
    shape = tf_bundle.field(2, tf_bundle.field(1, 4))
    for i in range(8):
        entries[b"layer_%d" % i] = tf_bundle.entry(1, shape, i % 2, 16 * (i // 2), 16, 0)
    for _ in range(400):
        forged = dict(entries)
        key = list(forged)[rng.integers(len(forged))]
        value = bytearray(forged[key])
        for _ in range(rng.integers(1, 4)):
            value[rng.integers(len(value))] = rng.integers(256)
        forged[key] = bytes(value[: rng.integers(len(value)) + 1])
        path.write_bytes(tf_bundle.table(forged))
        try:
            found = Checkpoint(tmp_path / "x")
            for name in found.variables:
                found.read(name)
        except CheckpointError:
            pass


SHAPE = tf_bundle.field(2, tf_bundle.field(1, 4))


@pytest.mark.parametrize(
    "entries, said",
    [
        ({b"x": tf_bundle.entry(1, SHAPE, 0, 0, 16, 0)}, "has no header entry"),
        ({b"": tf_bundle.field(1, 0)}, "the header states 0 data files"),
        ({b"": tf_bundle.field(1, 1) + tf_bundle.field(2, 1)}, "big-endian"),
        ({b"x": tf_bundle.entry(1, SHAPE, 3, 0, 16, 0)}, "'x' lies in data file 3"),
        ({b"x": tf_bundle.entry(7, SHAPE, 0, 0, 16, 0)}, "'x' has TensorFlow's dtype number 7"),
        ({b"x": tf_bundle.entry(1, SHAPE, 0, 0, 12, 0)}, "'x' has 12 bytes, but its shape (4,)"),
        ({b"x": tf_bundle.entry(1, SHAPE, 0, 2**62, 16, 0)}, "is cut off at byte 16"),
        ({b"x": tf_bundle.entry(1, SHAPE * 9, 0, 0, 16, 0)}, "'x' has the shape"),
        ({b"x": tf_bundle.entry(1, tf_bundle.field(2, tf_bundle.field(1, -1)), 0, 0, 16, 0)},
         "'x' has the shape"),
        ({b"x": tf_bundle.field(7, b"")}, "'x' is stored in slices"),
        ({b"\xff": tf_bundle.entry(1, SHAPE, 0, 0, 16, 0)}, "is not UTF-8"),
        ({b"x": b"\x08"}, "a number does not end"),
        ({b"x": b"\x12\x7fab"}, "127 bytes are announced and 2 are left"),
        ({b"x": b"\x0b"}, "a field of kind 3"),
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense(entries, said, tmp_path):
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(16))
    header = {} if "header entry" in said else {b"": tf_bundle.field(1, 1)}
    (tmp_path / "x.index").write_bytes(tf_bundle.table({**header, **entries}))
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        Checkpoint(tmp_path / "x")
    assert str(tmp_path / "x.") in str(error.value)


# --- the gin file ---------------------------------------------------------------------------------


def test_gin_values_scopes_macros_and_references(tmp_path):
    path = tmp_path / "x.gin"
    path.write_text(
        """
        import some.module
        from other import thing
        size = 3  # a comment
        long/macro.value = %size
        text = 'a # no comment, (no bracket'
        module.Class.width = %long
        encoder/Class.width = 7
        Class.layers = \\
            [@module.A, [@B(), "name", {'rate': %size}],
             @scope/C]
        Class.nothing = None
        Class.numbers = (1e-06, -2, .5, True)
        """.replace("\n        ", "\n")
    )
    gin = GinConfig(path)
    assert gin.get("decoder", "Class", "width") == 3 and gin.get("encoder", "Class", "width") == 7
    assert gin.macro("text") == "a # no comment, (no bracket" and gin.macro("absent", 5) == 5
    layers = gin.get("", "Class", "layers")
    assert layers == [Reference("module.A"), [Reference("B()"), "name", {"rate": 3}], layers[2]]
    assert [str(layers[0]), str(layers[1][0]), str(layers[2])] == ["A", "B", "scope/C"]
    assert gin.get("", "Class", "nothing", 4) is None
    assert gin.get("", "Class", "numbers") == (1e-06, -2, 0.5, True)


@pytest.mark.parametrize(
    "text, said",
    [
        ("d_model = [1,\n 2", r"line 1: the statement .* does not end"),
        ("x = 1\nnot gin at all", "line 2: 'not gin at all' is neither an assignment"),
        ("A.b = __import__('os').system('true')", "line 1: .* is not a value"),
        ("A.b = " + "[" * 5000 + "]" * 5000, "line 1: .* is not a value"),
        ("A.b = %absent", "%absent is used but never set"),
        ("a = %b\nb = %a\nA.b = %a", "the macro %a refers to itself"),
        ("include 'other.gin'", "neither an assignment nor an import"),
    ],
)
def test_gin_that_cannot_be_read(text, said, tmp_path):
    path = tmp_path / "x.gin"
    path.write_text(text)
    with pytest.raises(GinError, match=said) as error:
        GinConfig(path).get("", "A", "b")
    assert str(path) in str(error.value)
