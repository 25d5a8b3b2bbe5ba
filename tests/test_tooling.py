"""What people do to a transformers model: compile, export, quantise, adapt, offload, distribute."""

import copy
import subprocess
import sys

import accelerate
import pytest
import tolerances
import torch
from conftest import tiny_config
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config
from transformers import T5ForConditionalGeneration as T5

from modeling_convt5 import (
    ConvT5EncoderModel,
    ConvT5ForConditionalGeneration,
    ConvT5ForQuestionAnswering,
    ConvT5ForSequenceClassification,
    ConvT5ForTokenClassification,
    ConvT5Model,
)

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["dynamic", "attention"])
CLASSES = {
    cls.__name__: cls
    for cls in (
        ConvT5Model,
        ConvT5EncoderModel,
        ConvT5ForConditionalGeneration,
        ConvT5ForSequenceClassification,
        ConvT5ForTokenClassification,
        ConvT5ForQuestionAnswering,
    )
}
ENCODERS = (ConvT5EncoderModel, ConvT5ForTokenClassification)


def _model(mixer="lightweight", **fields):
    config = tiny_config(encoder_mixers=mixer, decoder_mixers=mixer, **fields)
    return ConvT5ForConditionalGeneration(config).eval()


def _batch(batch=2, length=9, target_length=6):
    mask = torch.ones(batch, length).long()
    mask[0, length - 2 :] = 0
    return {
        "input_ids": torch.randint(2, 40, (batch, length)),
        "attention_mask": mask,
        "labels": torch.randint(2, 40, (batch, target_length)),
    }


def _inputs(name, batch=2, length=9, target_length=6):
    """What a class is called with; decoder inputs only where they are no copy of the text."""
    made = _batch(batch, length, target_length)
    made["input_ids"][:, 2] = 1  # an end of sequence, for the classifier
    inputs = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    if name in ("ConvT5Model", "ConvT5ForConditionalGeneration"):
        inputs["decoder_input_ids"] = made["labels"]
    return inputs


class First(torch.nn.Module):
    """The first output of a model: exporters take tensors, not transformers' outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.options = {} if isinstance(model, ENCODERS) else {"use_cache": False}

    def forward(self, *inputs):
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        return self.model(**dict(zip(names, inputs, strict=False)), **self.options)[0]


def _dynamic_shapes(inputs):
    batch, length, target = (torch.export.Dim(name) for name in ("batch", "length", "target"))
    return ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: target})[: len(inputs)]


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_training_step_compiles_into_one_graph(mixer):
    model = _model(mixer).double().train()
    batch, gradients = _batch(), []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=tolerances.FLOAT64_MODEL, rtol=0
        )


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_compiles_into_one_graph(name):
    model = CLASSES[name](tiny_config(encoder_mixers=["dynamic", "attention"])).double().eval()
    batch = _inputs(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(**batch)[0], model(**batch)[0], atol=tolerances.FLOAT64_MODEL, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_compiled_code_equals_eager(mixer):
    model, batch = _model(mixer, initializer_factor=1.0), _batch()
    compiled = torch.compile(model, fullgraph=True)
    for expected, actual in zip(model(**batch)[:2], compiled(**batch)[:2], strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerances.FLOAT32_LOGITS, rtol=0)


def _exported_equals_eager(name, **fields):
    model = First(CLASSES[name](tiny_config(**fields)).double().eval())
    inputs = tuple(_inputs(name, 3, 12, 7).values())
    shapes = (_dynamic_shapes(inputs),)
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    for shape in ((1, 5, 1), (4, 40, 23)):
        inputs = tuple(_inputs(name, *shape).values())
        torch.testing.assert_close(
            exported(*inputs), model(*inputs), atol=tolerances.FLOAT64_MODEL, rtol=0
        )


@pytest.mark.parametrize("num_filters", [2, None])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_export_with_any_batch_and_length(mixer, num_filters):
    fields = {"encoder_mixers": mixer, "decoder_mixers": mixer, "num_filters": num_filters}
    _exported_equals_eager("ConvT5ForConditionalGeneration", **fields)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_exports(name):
    _exported_equals_eager(name, encoder_mixers=["dynamic", "attention"], cross_attention=False)


def _overflowing_weights(model):
    """Feed-forward weights that carry activations past 65,504, as those of large T5s do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".wi_0." in name or ".wi_1." in name:
                weight.mul_(400.0)
    return model


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_float16_stays_finite_where_t5_overflows(mixer):
    fields = {"feed_forward_proj": "gated-gelu", "d_model": 64, "d_ff": 128}
    t5_config = T5Config(
        vocab_size=40, d_kv=16, num_heads=4, num_layers=2, decoder_start_token_id=0, **fields
    )
    batch = _batch()
    t5 = _overflowing_weights(T5(t5_config).eval()).half()
    assert not t5(**batch).logits.isfinite().all(), "weights that prove nothing"
    model = _overflowing_weights(_model(mixer, **fields)).half()
    output = model(**batch)
    assert output.logits.isfinite().all() and output.loss.isfinite()
    generated = model.generate(
        batch["input_ids"], max_new_tokens=6, return_dict_in_generate=True, output_logits=True
    )
    assert all(logits.isfinite().all() for logits in generated.logits)


def _same_logits_and_tokens(actual, expected, batch):
    close = {"atol": tolerances.FLOAT32_LOGITS, "rtol": 0}
    torch.testing.assert_close(actual(**batch).logits, expected(**batch).logits, **close)
    ids, kwargs = batch["input_ids"], {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(actual.generate(ids, **kwargs), expected.generate(ids, **kwargs))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_disk_offload_and_device_maps(mixer, stack, tmp_path):
    model = _model(mixer, initializer_factor=1.0)
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    other = {"encoder": "decoder", "decoder": "encoder"}[stack]
    device_map = dict.fromkeys(("shared", other, "lm_head"), "cpu")
    device_map |= {f"{stack}.{name}": "cpu" for name, _ in getattr(model, stack).named_children()}
    device_map[f"{stack}.layers"] = "disk"
    loaded = ConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(p.device.type == "meta" for p in getattr(loaded, stack).parameters())
    _same_logits_and_tokens(loaded, model, _batch())


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_cpu_offload(mixer):
    model = _model(mixer, initializer_factor=1.0)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert all(p.device.type == "meta" for p in offloaded.decoder.layers.parameters())
    _same_logits_and_tokens(offloaded, model, _batch())


def test_an_automatic_device_map_keeps_layers_whole(tmp_path):
    model = _model(["dynamic", "attention"], initializer_factor=1.0)
    model.save_pretrained(tmp_path / "model")
    loaded = ConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": "16KB"},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    parts = [name.split(".layers.")[1] for name in loaded.hf_device_map if ".layers." in name]
    assert all(part.isdigit() for part in parts), loaded.hf_device_map
    _same_logits_and_tokens(loaded, model, _batch())


DDP = """
import itertools
import sys
import torch
import torch.distributed as dist
import modeling_convt5
from torch.nn.parallel import DistributedDataParallel

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["dynamic", "attention"])
FIELDS = {
    "cross-attention": {},
    "none": {"cross_attention": False},
    "in one layer": {"cross_attention": [True, False]},
    "released": {"position_embeddings": "learned", "pointwise": True, "mixer_bias": True},
    "untied": {"share_embeddings": False, "tie_word_embeddings": False},
}
IDS = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(1))
IDS[:, -1] = 1
LABELS = {
    "ForConditionalGeneration": {"labels": IDS[:, :6]},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
    "ForTokenClassification": {"labels": IDS % 2},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([4, 2, 5, 6])
    },
    "Model": {"decoder_input_ids": IDS[:, :6]},
    "EncoderModel": {},
}

def loss(model, rows):
    batch = {"input_ids": IDS, **LABELS[NAME]}
    output = model(**{name: value[rows] for name, value in batch.items()})
    return output.last_hidden_state.square().mean() if output.get("loss") is None else output.loss

def run(rank, file):
    global NAME
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    compared = 0
    for NAME, mixer, fields in itertools.product(LABELS, MIXERS, FIELDS):
        torch.manual_seed(0)
        config = modeling_convt5.ConvT5Config(
            vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_filters=2,
            dropout_rate=0.0, encoder_mixers=mixer, decoder_mixers=mixer, **FIELDS[fields],
        )
        model = getattr(modeling_convt5, "ConvT5" + NAME)(config).double()
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # an unused parameter would fail the second step
            model.zero_grad()
            loss(parallel, slice(2 * rank, 2 * rank + 2)).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss(model, slice(None)).backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        compared += 1
    if rank == 0:
        print(compared, "models")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=2)
"""


def test_distributed_training_averages_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "rendezvous"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "150 models\n"


def test_seq2seq_trainer_with_all_its_switches(tmp_path):
    rows = [{"input_ids": ids, "labels": ids.flip(0)} for ids in torch.randint(2, 40, (8, 7))]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        label_smoothing_factor=0.1,
        bf16=True,
        optim="adafactor",
        predict_with_generate=True,
        generation_max_length=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    model = _model()

    def collate(rows):  # label smoothing takes the labels away: as DataCollatorForSeq2Seq
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        made = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return {**batch, "decoder_input_ids": made}

    trainer = Seq2SeqTrainer(model, arguments, collate, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().training_loss > 0
    predictions = trainer.predict(rows).predictions
    assert predictions.shape[0] == 8 and (predictions[:, 0] == 0).all()


def test_accumulated_batches_take_the_step_of_one_large_batch(tmp_path):
    """Labels of unequal number: each counts the same, in whichever batch it lies."""
    rows = []
    for ids, real in zip(torch.randint(2, 40, (8, 7)), (7, 1, 4, 7, 2, 6, 3, 5), strict=True):
        labels = ids.flip(0).masked_fill(torch.arange(7) >= real, -100)
        rows.append({"input_ids": ids, "labels": labels})
    trained = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        torch.manual_seed(0)
        model = _model("dynamic").double().train()
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path / str(size)),
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        Seq2SeqTrainer(model, arguments, train_dataset=rows).train()
        trained.append(model.state_dict())
    assert not torch.equal(trained[0]["lm_head.weight"], _model("dynamic").lm_head.weight.double())
    for other in trained[1:]:
        for name, weight in trained[0].items():
            close = {"atol": tolerances.FLOAT64_MODEL, "rtol": 0}
            torch.testing.assert_close(other[name], weight, **close)


# peft asks for a property that transformers 5.24 renames.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_lora_trains_saves_and_merges(mixer, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = _model(mixer).double(), _batch()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**batch).loss
        loss.backward()
        idle = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, idle
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    adapted.eval()
    logits = adapted(**batch).logits
    tokens = adapted.generate(input_ids=batch["input_ids"], max_new_tokens=5)
    adapted.save_pretrained(tmp_path)
    fresh = _model(mixer).double()
    fresh.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    close = {"atol": tolerances.FLOAT64_MODEL, "rtol": 0}
    torch.testing.assert_close(again(**batch).logits, logits, **close)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, logits, **close)
    assert torch.equal(merged.generate(batch["input_ids"], max_new_tokens=5), tokens)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # both the exporter's own
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_onnx_equals_eager(mixer, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = _model(mixer, initializer_factor=1.0)
    # The exporter takes sdpa apart into views that its own strides do not allow.
    model.set_attn_implementation("eager")
    model, name = First(model).eval(), "ConvT5ForConditionalGeneration"
    inputs, path = tuple(_inputs(name, 3, 12, 7).values()), tmp_path / "model.onnx"
    shapes = (_dynamic_shapes(inputs),)
    torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for shape in ((1, 5, 1), (4, 40, 23)):
        inputs = tuple(_inputs(name, *shape).values())
        arrays = [tensor.numpy() for tensor in inputs]
        actual = torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])
        torch.testing.assert_close(actual, model(*inputs), atol=tolerances.FLOAT32_LOGITS, rtol=0)
