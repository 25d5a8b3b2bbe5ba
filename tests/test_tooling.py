"""What people do to a transformers model: compile, export, quantise, adapt, offload, distribute."""

import subprocess
import sys

import pytest
import tolerances
import torch
from conftest import tiny_config
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config
from transformers import T5ForConditionalGeneration as T5

from modeling_convt5 import ConvT5EncoderModel, ConvT5ForConditionalGeneration

MIXERS = ("depthwise", "lightweight", "dynamic", "attention", ["dynamic", "attention"])


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


@pytest.mark.parametrize("num_filters", [2, None])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_export_with_any_batch_and_length(mixer, num_filters):
    model = _model(mixer, num_filters=num_filters).double()
    names = ("input_ids", "attention_mask", "decoder_input_ids")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, decoder_input_ids):
            inputs = (input_ids, attention_mask, decoder_input_ids)
            return self.model(**dict(zip(names, inputs, strict=True)), use_cache=False).logits

    def inputs(batch, length, target_length):
        made = _batch(batch, length, target_length)
        return made["input_ids"], made["attention_mask"], made["labels"]

    batch, length, target = (torch.export.Dim(name) for name in ("batch", "length", "target"))
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: target})
    exported = torch.export.export(Logits(), inputs(3, 12, 7), dynamic_shapes=shapes).module()
    for shape in ((1, 5, 1), (4, 40, 23)):
        arguments = inputs(*shape)
        expected = Logits()(*arguments)
        torch.testing.assert_close(
            exported(*arguments), expected, atol=tolerances.FLOAT64_MODEL, rtol=0
        )


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


def test_disk_offload_and_device_maps(tmp_path):
    model, batch = _model(["dynamic", "attention"], initializer_factor=1.0), _batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    device_map = dict.fromkeys(("shared", "decoder", "lm_head"), "cpu")
    device_map |= {f"encoder.{name}": "cpu" for name, _ in model.encoder.named_children()}
    device_map["encoder.layers"] = "disk"
    loaded = ConvT5ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(p.device.type == "meta" for p in loaded.encoder.parameters())
    actual = loaded(**batch).logits
    torch.testing.assert_close(actual, expected, atol=tolerances.FLOAT32_LOGITS, rtol=0)
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    ids = batch["input_ids"]
    assert torch.equal(loaded.generate(ids, **kwargs), model.generate(ids, **kwargs))


DDP = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modeling_convt5 import ConvT5Config, ConvT5ForConditionalGeneration

def run(rank, file, cross_attention):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = ConvT5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_filters=2,
        dropout_rate=0.0, encoder_mixers=["dynamic", "attention"], cross_attention=cross_attention,
    )
    model = ConvT5ForConditionalGeneration(config).double()
    parallel = DistributedDataParallel(model)
    ids = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[:, :6]
    for _ in range(2):  # an unused parameter would fail the second step
        model.zero_grad()
        mine = slice(2 * rank, 2 * rank + 2)
        parallel(input_ids=ids[mine], labels=labels[mine]).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    dist.destroy_process_group()

if __name__ == "__main__":
    for cross_attention in (True, False):
        torch.multiprocessing.spawn(
            run, (f"{sys.argv[1]}-{cross_attention}", cross_attention), nprocs=2
        )
"""


def test_distributed_training_averages_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "rendezvous"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


# peft asks for a property that transformers 5.24 renames.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("mixer", ["lightweight", "dynamic", ["dynamic", "attention"]], ids=str)
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
@pytest.mark.parametrize("mixer", ["lightweight", "dynamic", "attention"])
def test_onnx_equals_eager(mixer, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoder = ConvT5EncoderModel(tiny_config(encoder_mixers=mixer, initializer_factor=1.0))
    encoder.eval()
    # The exporter takes sdpa apart into views that its own strides do not allow.
    encoder.set_attn_implementation("eager")

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state

    example = _batch(3, 12)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    path = tmp_path / "encoder.onnx"
    torch.onnx.export(
        States().eval(),
        (example["input_ids"], example["attention_mask"]),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 5), (4, 40)):
        inputs = _batch(*shape)
        names = [node.name for node in session.get_inputs()]
        arrays = [inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()]
        actual = session.run(None, dict(zip(names, arrays, strict=True)))[0]
        expected = States()(inputs["input_ids"], inputs["attention_mask"])
        torch.testing.assert_close(
            torch.from_numpy(actual), expected, atol=tolerances.FLOAT32_LOGITS, rtol=1e-5
        )
