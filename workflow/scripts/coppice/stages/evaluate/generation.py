"""What a model answers to a few questions, for a reader's own impression; no number rests on it."""

from coppice import models
from coppice.data import prompts


def answers(model, tokenizer, questions, prompt, new_tokens):
    """[{prompt, text}]: the likeliest continuation of each question, token by token, at most `new_tokens` of them.

    prompt: the form of the question, alpaca, chat or none. A question that leaves no room in the model's context has
    the text None.
    """
    import torch

    found = []
    for question in questions:
        text, special = prompts.asked(question, prompt, tokenizer)
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        room = min(new_tokens, models.context_length(model) - ids.shape[1])
        if room < 1:
            found.append({"prompt": question, "text": None})
            continue
        ids = ids.to(model.get_input_embeddings().weight.device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
        found.append({"prompt": question, "text": said})
    return found
