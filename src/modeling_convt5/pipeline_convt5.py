"""`pipeline("text2text-generation", model=..., trust_remote_code=True)`, on every transformers.

transformers 5 has no such pipeline any more; a checkpoint names this one in its config.json.
"""

from typing import Any

from transformers import GenerationConfig
from transformers.pipelines.base import Pipeline


class Text2TextGenerationPipeline(Pipeline):
    """Texts in, generated texts out, with the arguments and results of transformers 4."""

    _pipeline_calls_generate = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    # Those of transformers 4; a checkpoint's generation_config.json goes before them.
    _default_generation_config = GenerationConfig(max_new_tokens=256, num_beams=4)

    def __call__(self, inputs: str | list[str], **kwargs: Any) -> list:
        """Generate from one text, or from each text of a list.

        Args:
            inputs: one text or several.
            kwargs: `truncation`, `max_length` (the tokenizer's), `return_tensors=True` for token
                ids, `skip_special_tokens=False` to see sentinels, `batch_size`; everything else
                goes to `generate`.

        Returns:
            A list of {"generated_text": str} (or {"generated_token_ids": tensor}): one for each
            text, or a list of lists where `num_return_sequences` asks for several a text.

        Raises:
            ValueError: if there is no tokenizer, or for inputs that are not texts.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This pipeline has no tokenizer: save one beside the model "
                "(tokenizer.save_pretrained(folder)), or pass `tokenizer=`."
            )
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list) and all(len(result) == 1 for result in results):
            return [result[0] for result in results]
        return results

    def _sanitize_parameters(
        self,
        truncation=None,
        return_tensors=None,
        skip_special_tokens=None,
        clean_up_tokenization_spaces=None,
        **generate_kwargs,
    ):
        postprocess = {
            "return_tensors": return_tensors,
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        preprocess = {} if truncation is None else {"truncation": truncation}
        given = {key: value for key, value in postprocess.items() if value is not None}
        return preprocess, generate_kwargs, given

    def preprocess(self, text, truncation=False):
        if not isinstance(text, str):
            raise ValueError(f"An input is {text!r}, expected a text (str).")
        encoded = self.tokenizer(
            (self.prefix or "") + text, truncation=truncation, return_tensors="pt"
        )
        encoded.pop("token_type_ids", None)  # which the model does not have
        return encoded

    def _forward(self, model_inputs, **generate_kwargs):
        if hasattr(self, "_prepare_generate_kwargs"):
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        else:  # transformers before 5.20 or so keeps the merged defaults in one place
            generate_kwargs.setdefault("generation_config", self.generation_config)
        batch = len(model_inputs["input_ids"])
        output_ids = self.model.generate(**model_inputs, **generate_kwargs)
        return {"output_ids": output_ids.unflatten(0, (batch, -1))}

    def postprocess(
        self,
        model_outputs,
        return_tensors=False,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    ):
        records = []
        for ids in model_outputs["output_ids"][0]:
            if return_tensors:
                records.append({"generated_token_ids": ids})
                continue
            text = self.tokenizer.decode(
                ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
            records.append({"generated_text": text})
        return records
