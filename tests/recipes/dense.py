"""Terms of a loss written plainly, over whole logits and whole relations: what the recipes are compared with."""

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax.models.transformer import Transformer

constant = jax.lax.stop_gradient


def kl(a, b):
  return jnp.sum(jnp.where(a > 0, a * (jnp.log(jnp.where(a > 0, a, 1.0)) - jnp.log(b)), 0.0), -1)


def jensen_shannon(p, q, beta):
  m = beta * p + (1 - beta) * q
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


def taid(p, q, tau):
  target = constant(q) ** (1 - tau) * p**tau
  return kl(target / jnp.sum(target, -1, keepdims=True), q)


def adaptive_kl(p, q, mu):
  """A token is in the head if it and all likelier ones have at most the mass mu, or if it is the likeliest."""
  up_to = jnp.sum(jnp.where(p[..., None, :] >= p[..., :, None], p[..., None, :], 0.0), -1)
  head = (up_to <= mu) | (p == jnp.max(p, -1, keepdims=True))
  gap = constant(jnp.abs(p - q))
  weight = jnp.sum(jnp.where(head, gap, 0.0), -1) / jnp.sum(gap, -1)
  return weight * kl(p, q) + (1 - weight) * kl(q, p)


DIVERGENCES = {  # fn(p, q, **options), p the teacher
    'forward_kl': lambda p, q: kl(p, q),
    'reverse_kl': lambda p, q: kl(q, p),
    'jensen_shannon': jensen_shannon,
    'scaled_jensen_shannon': lambda p, q, beta: jensen_shannon(p, q, beta) / (beta * (1 - beta)),
    'symmetric_kl': lambda p, q, reverse_share: (1 - reverse_share) * kl(p, q) + reverse_share * kl(q, p),
    'taid': taid,
    'skew_kl': lambda p, q, alpha: kl(p, alpha * p + (1 - alpha) * q),
    'skew_reverse_kl': lambda p, q, alpha: kl(q, (1 - alpha) * p + alpha * q),
    'total_variation': lambda p, q: jnp.sum(jnp.abs(p - q), -1) / 2,
    'adaptive_kl': adaptive_kl,
}
OPTIONS = {  # of which no divergence has its default here
    'forward_kl': {}, 'reverse_kl': {}, 'jensen_shannon': {'beta': 0.3}, 'scaled_jensen_shannon': {'beta': 0.3},
    'symmetric_kl': {'reverse_share': 0.3}, 'taid': {'tau': 0.7}, 'skew_kl': {'alpha': 0.3},
    'skew_reverse_kl': {'alpha': 0.3}, 'total_variation': {}, 'adaptive_kl': {'mu': 0.2},
}


def divergence(name, student_logits, teacher_logits, *, temperature=1.0, **options):
  p, q = (jax.nn.softmax(logits / temperature) for logits in (teacher_logits, student_logits))
  return DIVERGENCES[name](p, q, **options)


def top_k(name, policy, student_logits, known, **options):
  """A divergence to a teacher of whom ids, logprobs [n, k] and the rest's mass `tail` [n] are known."""
  p, q = jnp.exp(known['logprobs']), jax.nn.softmax(student_logits)
  q = jnp.take_along_axis(q, known['ids'], -1)
  rest = lambda x: 1 - jnp.sum(x, -1, keepdims=True)
  if policy == 'renormalise':
    p, q = (x / jnp.sum(x, -1, keepdims=True) for x in (p, q))
  else:
    tail = known['tail'][..., None] if policy == 'tail' else jnp.zeros_like(rest(p))
    p = p if policy == 'tail' else p / jnp.sum(p, -1, keepdims=True)
    p, q = jnp.concatenate([p, tail], -1), jnp.concatenate([q, rest(q)], -1)
  return DIVERGENCES[name](p, q, **options)


def logprobs(logits, targets):
  return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def fitnets(ours, theirs):
  return jnp.sum((ours - theirs) ** 2, -1) / ours.shape[-1]


def cosine(ours, theirs):
  norm = lambda x: jnp.sqrt(jnp.sum(x * x, -1))
  return 1 - jnp.sum(ours * theirs, -1) / (norm(ours) * norm(theirs))


FEATURES = {'fitnets': fitnets, 'cosine': cosine, 'patient': lambda ours, theirs: 2 * cosine(ours, theirs)}


def linear_cka(ours, theirs, mask):
  """By the [n, n] similarities of the tokens that count, centred."""

  def similarities(x):
    weight = mask.reshape(-1, 1)
    x = x.reshape(-1, x.shape[-1])
    x = weight * (x - jnp.sum(weight * x, 0, keepdims=True) / jnp.sum(weight))
    return x @ x.T

  k, l = similarities(ours), similarities(theirs)
  return 1 - jnp.sum(k * l) / jnp.sqrt(jnp.sum(k * k) * jnp.sum(l * l))


BATCH_FEATURES = {'linear_cka': linear_cka}


def _relation(a, b, segment_ids):
  """Its logarithm, [B, H, T, T], of a, b [B, T, H, D]."""
  places = jnp.arange(a.shape[1])
  seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (places[None, :, None] >= places[None, None, :])
  scores = jnp.einsum('bthd,bshd->bhts', a, b) / np.sqrt(a.shape[-1])
  return jax.nn.log_softmax(jnp.where(seen[:, None], scores, -1e9))


def _relation_gap(ours, theirs, segment_ids):
  """ours, theirs: (a, b) of `_relation`; the mean over heads, [B, T]."""
  log_p, log_q = _relation(*theirs, segment_ids), _relation(*ours, segment_ids)
  return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), 1)


def minilm(ours, theirs, segment_ids):
  """ours, theirs: (q, k, v, ...)."""
  heads = ours[0].shape[2]
  whole = lambda x: jnp.repeat(x, heads // x.shape[2], 2)
  ours, theirs = ([whole(x) for x in model[:3]] for model in (ours, theirs))
  attention = _relation_gap(ours[:2], theirs[:2], segment_ids)
  return attention + _relation_gap((ours[2], ours[2]), (theirs[2], theirs[2]), segment_ids)


def minilm_v2(ours, theirs, segment_ids, *, relation_heads):
  split = lambda x: x.reshape(*x.shape[:2], relation_heads, -1)
  return sum(_relation_gap((split(s),) * 2, (split(t),) * 2, segment_ids) for s, t in zip(ours[:3], theirs[:3]))


RELATIONS = {'minilm': minilm, 'minilm_v2': minilm_v2}


def reverse_kl_advantages(teacher, sampler, mask, *, discount=0.0):
  """A_t = sum_k discount^k r_{t + k} over the sampled tokens of a row, in numpy."""
  found = np.zeros(mask.shape)
  for row, places in enumerate(np.flatnonzero(one) for one in mask):
    r = (np.asarray(teacher) - sampler)[row, places]
    for i, place in enumerate(places):
      found[row, place] = sum(discount**k * r[i + k] for k in range(len(r) - i))
  return found


def minillm_advantages(teacher, sampler, mask, *, discount=1.0, offset=1):
  """The mean of the discounted rewards from `offset` tokens later on."""
  found = np.zeros(mask.shape)
  for row, places in enumerate(np.flatnonzero(one) for one in mask):
    r = (np.asarray(teacher) - sampler)[row, places]
    for i, place in enumerate(places):
      later = [discount**k * r[i + k] for k in range(offset, len(r) - i)]
      found[row, place] = np.mean(later) if later else 0.0
  return found


TEACHER_ADVANTAGES = {'reverse_kl': reverse_kl_advantages, 'minillm': minillm_advantages}


def outputs(config, params, batch, taps=()):
  """(logits [B, T, V], taps) of a whole batch."""
  found = Transformer(config).apply(
      {'params': params}, batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids, taps=taps
  )
  return found.logits, found.taps


def term_values(term, record, mask, ours, theirs, projectors, teacher_logprobs, *, temperature=1.0):
  """[B, T], or a number, of a term whose section holds numbers, not schedules, and pairs of layers.

  ours, theirs: (logits, taps) of the two models. teacher_logprobs: numpy [B, T], of the targets at the temperature.
  """
  options, batch = term['options'], record.batch
  if term['kind'] == 'cross_entropy':
    return -logprobs(ours[0], batch.targets)
  if term['kind'] == 'divergence':
    t = options['temperature']
    values = divergence(options['name'], ours[0], theirs[0], temperature=t, **options['options'])
    return values * t * t if options['scale_by_squared_temperature'] else values
  if term['kind'] == 'policy':
    advantages = TEACHER_ADVANTAGES[options['advantage']](
        teacher_logprobs, record.sampler_logprobs, mask, **options['advantage_options']
    ) + options['reward_weight'] * record.advantages
    ratio = jnp.exp((logprobs(ours[0] / temperature, batch.targets) - record.sampler_logprobs) * mask)
    return -ratio * advantages.astype(np.float32)
  pairs = [tuple(_layer(*at) for at in ((ours[1], s), (theirs[1], t))) for s, t in options['layers']]
  if term['kind'] == 'relations':
    gaps = [RELATIONS[options['relation']](*pair, batch.segment_ids, **options['options']) for pair in pairs]
  elif term['kind'] == 'hidden':
    used = [projectors[str(s)] for s, _ in options['layers']]
    gaps = [FEATURES[options['feature']](s[3] @ w, t[3]) for (s, t), w in zip(pairs, used, strict=True)]
  else:
    gaps = [BATCH_FEATURES[options['feature']](s[3], t[3], mask) for s, t in pairs]
  return sum(gaps) / len(gaps)


def _layer(taps, number):
  """(q, k, v, hidden) of a layer."""
  return tuple(taps[name][number] for name in ('q', 'k', 'v', 'hidden'))
