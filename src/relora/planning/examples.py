"""The first training examples of a fine-tuning run as text, before anything is trained."""

from itertools import islice

from relora.config import FinetuneConfig
from relora.data.finetuning.instruct import encode, render_example
from relora.data.tokenizer import load_tokenizer
from relora.recipes.finetuning_inputs import base_folder, encode_labelled, read_records
from relora.recipes.from_settings import form_of


def show_examples(config: FinetuneConfig, number: int) -> str:
    """Render the first `number` training examples as the model will see them, with the scored part marked."""
    tokenizer = load_tokenizer(str(base_folder(config)), trust_remote_code=config.model.trust_remote_code)
    records, _, notes = read_records(config)
    data = config.data
    if config.task == "classification":
        examples = encode_labelled(config, tokenizer, records)
        rows = []
        for one in range(min(number, len(examples))):
            label = examples.labels[one].item()
            text = tokenizer.decode(examples.ids[examples.bounds[one] : examples.bounds[one + 1]].tolist())
            rows.append(f"{examples.places[one]}: {examples.names[int(label)] if examples.names else label}\n{text}")
        return "\n\n".join(["\n".join([*notes, *examples.notes]), *rows]).lstrip()
    first = list(islice(records, number))
    found = encode(first, tokenizer, form_of(config), sequence_length=data.sequence_length + 1, skip_bad=data.skip_bad)
    heading = "\n".join([*notes, str(found), *found.notes])
    return "\n\n".join([heading, *(render_example(example, tokenizer) for example in found.examples)])
