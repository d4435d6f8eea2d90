"""One vector trained by a partner's loss in place of an adapter: what one vector at a site can be made to do.

After BiPO (Cao et al. 2024, arXiv:2406.00045), without its sign flips: the question here is what base + v reaches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers import gradients
from helpers.lm import architecture, batches, steering
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair


def optimised_vector(
    model: nn.Module, pairs: Sequence[TrainingPair], site: str, recipe: Recipe, scale: float, seed: int
) -> Tensor:
    """Train v, (d,), added at a site where responses are predicted, by the recipe's loss on as many batches as
    its whole run has, whatever its stop.

    scale: the root mean square of the site's states; Adam's steps are a tenth of it. The model itself stays as it is.
    """
    torch.manual_seed(seed)
    width = architecture.width(model, site)
    v = nn.Parameter(1e-3 * scale * torch.randn(width))  # not zero: a dose of zero is no dose, and has no gradient
    optimiser = torch.optim.Adam([v], lr=scale / 10)
    epochs = [torch.randperm(len(pairs)).split(recipe.batch_size) for _ in range(recipe.epochs)]
    steps = [batch.tolist() for epoch in epochs for batch in epoch]
    for batch in tqdm(steps, desc=f"one vector at {site}", leave=False):
        v.grad = _gradient(model, [pairs[i] for i in batch], site, v, recipe)
        optimiser.step()
    return v.detach()


def _gradient(model, batch: list[TrainingPair], site: str, v: Tensor, recipe: Recipe) -> Tensor:
    """The gradient of a batch's loss at v, (d,), added up over parts of it where memory does not suffice for all."""
    whole = len(batch), _chosen_tokens(batch)

    def gradient(part: list[int]) -> Tensor:
        return torch.autograd.grad(_loss(model, [batch[i] for i in part], site, v, recipe, whole), v)[0]

    return sum(batches.shrinking([1] * len(batch), len(batch), gradient))


def _loss(model, pairs: list[TrainingPair], site: str, v: Tensor, recipe: Recipe, whole: tuple[int, int]) -> Tensor:
    """What pairs add to their batch's loss: the sigmoid DPO loss of base + v against the base, and the NLL a token of
    the chosen answers (TRL's `sft`). whole: how many pairs and chosen tokens the batch has."""
    n, sequences = len(pairs), [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    with steering.added(model, site, v, torch.tensor([len(s.prompt) - 1 for s in sequences])):
        policy = _response_logps(model, sequences)
    nll = -policy[:n].sum() / whole[1]
    if recipe.objective == "sft":
        return nll
    reference = policy.new_tensor([pair.base_logps for pair in pairs]).T
    preference = gradients.dpo_loss(policy[:n], policy[n:], *reference, recipe.beta) * n / whole[0]
    return preference + recipe.nll_weight * nll


def _chosen_tokens(pairs: Sequence[TrainingPair]) -> int:
    return sum(len(pair.chosen.response) for pair in pairs)


def _response_logps(model: nn.Module, sequences: Sequence[Tokens]) -> Tensor:
    """Sum of log pi(y_t | x, y_<t) over each response, (N,), with gradients."""
    inputs, attended = batches.right_padded([s.ids for s in sequences], model.device)
    logits = model(input_ids=inputs, attention_mask=attended, use_cache=False).logits[:, :-1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    taken = logps.gather(-1, inputs[:, 1:, None]).squeeze(-1)
    answered = [[len(s.prompt) <= t < len(s.ids) for t in range(1, inputs.shape[1])] for s in sequences]
    return (taken * torch.tensor(answered, device=model.device)).sum(dim=1)
