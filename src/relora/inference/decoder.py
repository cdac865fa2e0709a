"""Run a model of LLaMA's form for one token after another, without the host's work between the products.

    x = embedding(token)
    every layer:  q, k, v = projections(norm(x)), turned by position; k, v  ->  their place in the cache
                  x += o(attention(q, cache)); x += down(act(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

A token of a small model takes transformers five times as long as its arithmetic: modules, masks, caches that grow by a
copy. `Decoder` calls the products, norms and attention of the model's own modules and nothing else, over keys and
values in tensors of a fixed size (`KeyValues`). No weight is copied; layers with low-rank factors are called as they
are.

Which models have this form is seen, not looked up: the modules have the names and parts above, nobody has hooked or
replaced what would be left out, every token sees all before it, and a few tokens have the logits that the model itself
gives. For any other model `decoder_of` returns None, and transformers generates.

Texts of several lengths end at the same place of the cache, so that the next token of each has one place; what lies
before a text's first token is masked. Each text is read alone, unpadded, and by that gets the keys that it would get
without the others.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

Call = Callable[[Tensor], Tensor]
"""A part of the model: maps hidden states to hidden states."""

TRIED_TOKENS = 4
"""Tokens with which a model's form is tried: two are read at once, then one after another."""
_TOLERANCE = 1e-5
"""Largest difference between logits of two orders of summation in fp32, relative to the largest of them."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on a token's position only, not on how long the text has become."""
_MODEL = {"model", "lm_head"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TRIED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Models of the form -> whether their logits were those of a `Decoder`."""


class KeyValues:
    """Keys and values of several texts that end at one place, in tensors of a fixed size.

    Args:
        decoder: of the model.
        rows: number of texts.
        capacity: tokens that the longest of them may have.
    """

    def __init__(self, decoder: "Decoder", rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Places that are filled, of the longest text."""
        self.keys = [decoder.new_cache(rows, capacity) for _ in decoder.layers]
        self.values = [decoder.new_cache(rows, capacity) for _ in decoder.layers]
        self.cos, self.sin = decoder.rotations(capacity)
        self._starts: Tensor | None = None
        self._seen: Tensor | None = None

    def align(self, lengths: Sequence[int]) -> None:
        """Let texts of these lengths end at one place: everything before a text's start is masked."""
        self.length = max(lengths)
        if min(lengths) == self.length:
            return
        device = self.keys[0].device
        self._starts = torch.tensor([self.length - length for length in lengths], device=device)
        places = torch.arange(self.capacity, device=device)
        self._seen = (places >= self._starts[:, None])[:, None, None]

    def turns(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for the next token of every text, [texts or 1, 1, 1, size of a head]."""
        if self._starts is None:
            return self.cos[self.length], self.sin[self.length]
        positions = self.length - self._starts
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]

    def mask(self) -> Tensor | None:
        """Return which places the next token of every text sees, itself included; None if it sees all."""
        return None if self._seen is None else self._seen[..., : self.length + 1]


class Decoder:
    """The parts of one model as they are called for a token.

    Args:
        model: a model whose form `decoder_of` has seen.
    """

    def __init__(self, model: Any) -> None:
        body = model.model
        self.embed: Call = body.embed_tokens
        self.norm, self.head = _norm(body.norm), _product(model.lm_head)
        self.layers = [_Layer(layer) for layer in body.layers]
        self._rotary = body.rotary_emb
        self._like: Tensor = body.embed_tokens.weight

    def new_cache(self, rows: int, capacity: int) -> Tensor:
        """Return a tensor for the keys, or the values, of one layer: [rows, heads, capacity, size of a head]."""
        layer = self.layers[0]
        return self._like.new_zeros(rows, layer.key_heads, capacity, layer.head_size)

    def rotations(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of every position, [capacity, size of a head]."""
        positions = torch.arange(capacity, device=self._like.device)[None]
        cos, sin = (table[0] for table in self._rotary(self._like, positions))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)

    def read(self, ids: Sequence[int], cache: KeyValues, row: int = 0, end: int | None = None) -> Tensor:
        """Put a text, or what follows the `cache.length` tokens of row 0, into the cache.

        Args:
            ids: the tokens to be read.
            end: place after the text's last token; by default it begins at the first free one.

        Returns:
            The logits after the last token, [1, ids of the model].
        """
        begin = cache.length if end is None else end - len(ids)
        first = begin if end is None else 0  # the position of the first token in its text
        positions = slice(first, first + len(ids))
        states = self.embed(torch.tensor([list(ids)], device=self._like.device))
        mask = None
        if first and len(ids) > 1:
            mask = torch.ones(len(ids), first + len(ids), dtype=torch.bool, device=states.device).tril(first)
        where = _Where(
            cache.cos[positions], cache.sin[positions], begin, slice(begin - first, begin + len(ids)), mask, not first
        )
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            states = layer(states, keys[row : row + 1], values[row : row + 1], where)
        if end is None:
            cache.length = begin + len(ids)
        return self.head(self.norm(states[:, -1]))

    def step(self, tokens: Tensor, cache: KeyValues) -> Tensor:
        """Put the next token of every text into the cache and return the logits after it, [texts, ids of the model]."""
        states = self.embed(tokens[:, None])
        where = _Where(*cache.turns(), cache.length, slice(0, cache.length + 1), cache.mask(), False)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            states = layer(states, keys, values, where)
        cache.length += 1
        return self.head(self.norm(states[:, -1]))


class _Where(NamedTuple):
    """The places of some tokens in the cache, and what they see; the same for every layer."""

    cos: Tensor
    sin: Tensor
    place: int
    """Place of the first of the tokens."""
    seen: slice
    """Places that any of them sees."""
    mask: Tensor | None
    """Tells which of these each sees; None if it is all of them or, with `causal`, those up to itself."""
    causal: bool


class _Layer:
    """One layer's parts."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.second_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.q, self.k, self.v, self.o = (
            _product(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.q_norm, self.k_norm = (
            _norm(part) if (part := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        )
        self.gate, self.up, self.down = (_product(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.act: Call = mlp.act_fn
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.key_heads = int(attention.k_proj.weight.shape[0]) // self.head_size
        self.is_grouped: bool = attention.num_key_value_groups > 1

    def __call__(self, states: Tensor, keys: Tensor, values: Tensor, where: _Where) -> Tensor:
        """Return the layer's output for `states` [rows, tokens, width]; their keys and values go into the cache."""
        rows, tokens, _ = states.shape
        shape = rows, tokens, -1, self.head_size
        x = self.norm(states)
        q, k = self.q(x).view(shape), self.k(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = _turned(q.transpose(1, 2), where.cos, where.sin)
        keys.narrow(2, where.place, tokens).copy_(_turned(k.transpose(1, 2), where.cos, where.sin))
        values.narrow(2, where.place, tokens).copy_(self.v(x).view(shape).transpose(1, 2))
        attended = scaled_dot_product_attention(
            q,
            keys[:, :, where.seen],
            values[:, :, where.seen],
            attn_mask=where.mask,
            is_causal=where.causal and tokens > 1,
            scale=self.scaling,
            enable_gqa=self.is_grouped,
        )
        states = states + self.o(attended.transpose(1, 2).reshape(rows, tokens, -1))
        x = self.second_norm(states)
        return states + self.down(self.act(self.gate(x)) * self.up(x))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of numbers (i, i + size / 2) of every head by the angles of its position."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def _product(module: nn.Module) -> Call:
    """Return the call of a linear layer; that of a plain one leaves out the module around the product."""
    if type(module) is nn.Linear and not _is_hooked(module):
        return partial(linear, weight=module.weight, bias=module.bias)
    return module


def _norm(module: nn.Module) -> Call:
    """Return the call of a norm: torch's fused RMS norm where that gives the same bits."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or _is_hooked(module):
        return module
    fused: Call = partial(rms_norm, normalized_shape=(len(weight),), weight=weight, eps=eps)
    tried = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    return fused if torch.equal(fused(tried), module(tried)) else module


def decoder_of(model: PreTrainedModel) -> Decoder | None:
    """Return the decoder of a model that has the form, with the adapter that is in use; None for any other model."""
    if not _has_form(model):
        return None
    decoder = Decoder(model)
    if model not in _TRIED:
        _TRIED[model] = _agrees(decoder, model)
    return decoder if _TRIED[model] else None


def _has_form(model: Any) -> bool:
    """Return whether a model consists of the parts that a `Decoder` calls, and of nothing else."""
    body, config = getattr(model, "model", None), model.config
    if body is None or _parts(model) != _MODEL or _parts(body) != _BODY or not len(body.layers):
        return False
    layers: list[Any] = list(body.layers)
    if any(_parts(layer) != _LAYER or _parts(layer.mlp) != _MLP for layer in layers):
        return False
    attentions = [layer.self_attn for layer in layers]
    left_out = [model, body, body.rotary_emb, *layers, *attentions, *(layer.mlp for layer in layers)]
    return (
        all(_parts(attention) - _HEAD_NORMS == _PROJECTIONS for attention in attentions)
        and all(attention.config._attn_implementation == "sdpa" for attention in attentions)
        and not any(map(_is_replaced, left_out))
        and getattr(body.rotary_emb, "rope_type", None) in _ROPE_TYPES
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )


def _parts(module: nn.Module) -> set[str]:
    """Return the names of a module's parts."""
    return {name for name, _ in module.named_children()}


def _is_replaced(module: nn.Module) -> bool:
    """Return whether more, or something else, runs when a module is called than the code of a class of transformers."""
    own_code = type(module).__module__.startswith("transformers.models.") and "forward" not in vars(module)
    return _is_hooked(module) or not own_code


def _is_hooked(module: nn.Module) -> bool:
    """Return whether something is called before or after a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _agrees(decoder: Decoder, model: PreTrainedModel) -> bool:
    """Return whether the logits of a few tokens are the model's."""
    rows = model.get_input_embeddings().num_embeddings
    ids = [(7 * place + 3) % rows for place in range(TRIED_TOKENS)]
    device = model.device
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
        try:
            cache = KeyValues(decoder, 1, TRIED_TOKENS)
            found = [decoder.read(ids[:2], cache)]
            found += [decoder.step(torch.tensor([token], device=device), cache) for token in ids[2:]]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # parts of other shapes than LLaMA's
            return False
    largest = max(_TOLERANCE, 4 * torch.finfo(model.dtype).eps) * expected.abs().max()
    return bool(((torch.cat(found).float() - expected[1:]).abs() <= largest).all())
