"""The time loop of training, over packed rows.

Surprising: there are two. `step_by_step` is readable, differentiated by autograd and serves every setting; captions
that are fed with their true words take `fast`, which computes the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sat.model.attention import Attended, Attention, attend_for_inference, attend_hard
from sat.model.captioner import Captioner, Memory
from sat.model.draws import Draws, Site, uniform
from sat.model.kernels.choose import choose_kernels, choose_products
from sat.model.kernels.products import enough_for, padded
from sat.model.locations import Locations
from sat.model.loss import WordLoss, linear_cross_entropy
from sat.model.packing import Packing
from sat.model.passage import Inputs, Weights
from sat.model.plain_recurrence import PlainLoop, recur_plain
from sat.model.recurrence import Loop, recur


class Rollout(NamedTuple):
    """What the time loop leaves for the output layer and the loss: N rows, M packed words (legend in `captioner`)."""

    words: Tensor
    """[M, E] word vectors that were fed."""
    hidden: Tensor
    """[M, H] LSTM outputs."""
    context: Tensor | None
    """[M, D] gated contexts; None without attention."""
    alpha_sum: Tensor | None
    """[N, L] attention of each caption summed over its words; None without attention."""
    alpha: Tensor | None
    """[M, L] attention of each word; soft attention's is without gradient where `fast` served. None without any."""
    chosen: Tensor | None
    """[M] locations drawn by hard attention (-1: alpha itself was used), else None."""


def roll_out(model: Captioner, memory: Memory, draws: Draws, sampling_probability: float) -> Rollout:
    """Run `model` over the captions that `draws` are of; `memory` holds the images in the order of their packing."""
    if sampling_probability:
        return step_by_step(model, memory, draws, sampling_probability)
    return fast(model, memory, draws) if model.attention else fast_without_attention(model, memory, draws)


def word_losses(
    model: Captioner, rollout: Rollout, draws: Draws, smoothing: float, factors: Tensor | None = None
) -> WordLoss:
    """The loss of each word of a `rollout` along the captions that `draws` are of; `factors` [M] weigh the words."""
    features = model.dropped(_features(model, rollout), draws.of_words, Site.OUTPUT)
    weight, bias, kernels = model.vocabulary.weight, model.vocabulary.bias, choose_kernels(model.kernels, features)
    return linear_cross_entropy(features, weight, bias, draws.packing.targets, smoothing, kernels, factors)


def _features(model: Captioner, rollout: Rollout) -> Tensor:
    """What the vocabulary layer sees but for dropout, [M, E or H]."""
    words, hidden, context, *_ = rollout
    M, enough = len(words), enough_for(len(words), words)
    if model.output_state is None or enough == M:
        return model.output_features(words, hidden, context)
    context = None if context is None else padded(context, enough)
    return model.output_features(padded(words, enough), padded(hidden, enough), context)[:M]


def _fed(model: Captioner, packing: Packing) -> tuple[Tensor, Tensor]:
    """Vectors [M, E] of the true words and their share [M, 4H] of the gates, which each distinct word meets once."""
    vectors = model.embed(packing.distinct)
    if packing.roomy:
        return vectors, model.word_gates(vectors)
    vectors = padded(vectors, enough_for(len(vectors), vectors))
    return embedding(packing.input_place, vectors), embedding(packing.input_place, model.word_gates(vectors))


def fast(model: Captioner, memory: Memory, draws: Draws) -> Rollout:
    """The true words fed, through the hand-derived loop."""
    packing = draws.packing
    assert model.attention and model.context_gates
    dtype = memory.grid.dtype
    words, word_gates = _fed(model, packing)
    state = [model.state_gates.weight, model.attention.query.weight]
    gate_bias = words.new_empty(0)
    if model.gate:
        state.append(model.gate.weight)
        gate_bias = model.gate.bias.to(dtype)
    weights = Weights(
        state=torch.cat(state).to(dtype),
        gate_bias=gate_bias,
        context=model.context_gates.weight.to(dtype),
        score=model.attention.score.weight[0].to(dtype),
    )
    h, c = (state[:, 0][packing.row_image] for state in model.init_state(memory, draws.of_images))
    inputs = Inputs(memory.grid, memory.projection, word_gates, h.to(dtype), c)
    kernels = choose_kernels(model.kernels, memory.grid)
    products, locations = choose_products(model.kernels, memory.grid), locations_of(model, draws)
    loop = Loop(kernels, packing, model.attention.tanh, memory.regions, locations, products)
    return Rollout(words, *recur(loop, inputs, weights), locations.chosen if locations else None)


def fast_without_attention(model: Captioner, memory: Memory, draws: Draws) -> Rollout:
    """The same for a model without attention."""
    packing, dtype = draws.packing, memory.grid.dtype
    words, word_gates = _fed(model, packing)
    h, c = (state[:, 0][packing.row_image] for state in model.init_state(memory, draws.of_images))
    weight = model.state_gates.weight.to(dtype)
    kernels, products = choose_kernels(model.kernels, memory.grid), choose_products(model.kernels, memory.grid)
    hidden = recur_plain(PlainLoop(kernels, packing, products), word_gates, h.to(dtype), c, weight)
    return Rollout(words, hidden, None, None, None, None)


def locations_of(model: Captioner, draws: Draws) -> Locations | None:
    """Where hard attention looks: in train mode, or by `model.hard_inference`. None: as alpha says."""
    spec, chosen = model.spec, torch.empty_like(draws.packing.targets)
    if spec.attention != "hard" or (model.expects and not model.training):
        return None
    exact = uniform(draws.of_captions(Site.EXACT)) < (spec.hard_exact if model.training else 0.0)
    drawn = model.training or model.draws_locations
    return Locations(exact, uniform(draws.of_words(Site.LOCATION)) if drawn else None, chosen)


class _Step(NamedTuple):
    words: Tensor
    hidden: Tensor
    context: Tensor | None
    attended: Attended | None


def step_by_step(model: Captioner, memory: Memory, draws: Draws, sampling_probability: float) -> Rollout:
    """Any attention, any words fed: one word after another."""
    packing = draws.packing
    h, c = (state[:, 0][packing.row_image] for state in model.init_state(memory, draws.of_images))
    locations = locations_of(model, draws)
    fed_own = uniform(draws.of_words(Site.OWN_WORD)) < sampling_probability
    steps: list[_Step] = []
    for t, words in enumerate(model.embed(packing.inputs).split(packing.rows)):
        n = len(words)
        if t and sampling_probability:
            words = _mix_own_words(model, words, steps[-1], fed_own[packing.steps[t]])

        def attend(attention: Attention, query: Tensor, t: int = t) -> Attended:
            return _attend_rows(model, attention, memory, packing, t, query, locations)

        h, c, context, attended = model.advance(words, h[:n], c[:n], attend)
        steps.append(_Step(words, h, context, attended))
    return _packed(model, packing, steps)


def _packed(model: Captioner, packing: Packing, steps: list[_Step]) -> Rollout:
    words, hidden = torch.cat([step.words for step in steps]), torch.cat([step.hidden for step in steps])
    if model.attention is None:
        return Rollout(words, hidden, None, None, None, None)
    context = torch.cat([step.context for step in steps if step.context is not None])
    attendeds = [step.attended for step in steps if step.attended]
    alpha = torch.cat([attended.alpha for attended in attendeds])
    alpha_sum = alpha.new_zeros(packing.rows[0], alpha.shape[1]).index_add(0, packing.word_row, alpha)
    chosen = None
    if model.spec.attention == "hard" and model.training:
        chosen = torch.cat([attended.chosen for attended in attendeds if attended.chosen is not None])
    return Rollout(words, hidden, context, alpha_sum, alpha, chosen)


def _attend_rows(
    model: Captioner,
    attention: Attention,
    memory: Memory,
    packing: Packing,
    t: int,
    query: Tensor,
    locations: Locations | None,
) -> Attended:
    """Attend for the rows running at step t: `query` [n, A]. Rows of one image share its grid as slots [B_t, K_t]."""
    slots, B = packing.slots(t), packing.images_running[t]
    grid, projection, queries = memory.grid[:B], memory.projection[:B], slots.spread(query)
    regions = None if memory.regions is None else memory.regions[:B]
    numbers = None
    if locations and locations.uniform is not None:
        numbers = slots.spread(locations.uniform[packing.steps[t]])
    if locations and numbers is not None and model.training:
        exact = slots.spread(locations.exact[: len(query)])
        attended = attend_hard(attention, grid, projection, queries, exact, numbers, regions)
    else:
        how = "expectation" if model.expects else model.spec.hard_inference
        attended = attend_for_inference(attention, grid, projection, queries, how, regions, numbers)
    context, alpha, chosen = attended
    return Attended(slots.collect(context), slots.collect(alpha), None if chosen is None else slots.collect(chosen))


def _mix_own_words(model: Captioner, words: Tensor, before: _Step, own_words: Tensor) -> Tensor:
    """Scheduled sampling (Bengio et al. 2015): of `words` [n, E] those of bool `own_words` [n] give way to the model's.

    The model's own word is the most probable one after the step `before`, without dropout.
    """
    n = len(words)
    with torch.no_grad():
        context = None if before.context is None else before.context[:n]
        features = model.output_features(before.words[:n], before.hidden[:n], context)
        own = model.vocabulary(features).argmax(1)
    return torch.where(own_words[:, None], model.embed(own), words)
