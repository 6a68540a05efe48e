"""What a member runs with that was not trained by itself, such as a Mix'n'Match of trained widths.

In each layer it has the norm gains of the trained member whose layer is nearest in size, the full model being
the largest, and where the layer is the very same, all that the member owns there; so for the final norm, by
the mean size. Between gains of two neighbours nothing was found that is better (docs/LOG.md).
"""

import math
import operator
from collections.abc import Sequence
from statistics import fmean

from models.elastic.config import ElasticConfig
from models.elastic.granularity import LayerPlan, Plan
from models.elastic.owned import NOTHING, Owned, OwnedLayer, Parts


class Borrowed(Parts):
    """What a member has of others that were trained.

    Args:
        config: the full model's shape.
        plan: the member, neither the full model nor a prefix of its layers.
        members: what trained members own.
    """

    def __init__(self, config: ElasticConfig, plan: Plan, members: Sequence[Owned]) -> None:
        self._config, self._plan, self._all = config, plan, list(members)
        self._members = [one for one in members if not one.plan.is_layer_prefix]
        self._layers = {layer.index: self._nearest(layer) for layer in plan.layers}
        full = LayerPlan(index=0, ffn=plan.ffn, groups=plan.groups)
        sizes = {None: self._size(full)} | {one: self._mean(one.plan) for one in self._members}
        nearest = min(sizes, key=lambda one: abs(sizes[one] - self._mean(plan)))
        self.norm = None if nearest is None else nearest.norm

    def is_of(self, plan: Plan, members: Sequence[Owned]) -> bool:
        """Return whether this is what the member has of these."""
        same = len(members) == len(self._all) and all(map(operator.is_, members, self._all))
        return same and plan == self._plan

    def layer(self, index: int) -> OwnedLayer:
        """See `Parts`."""
        return self._layers[index]

    def _nearest(self, layer: LayerPlan) -> OwnedLayer:
        full = LayerPlan(index=layer.index, ffn=self._plan.ffn, groups=self._plan.groups)
        there = {own: one for one in self._members for own in one.plan.layers if own.index == layer.index}
        nearest = min([full, *there], key=lambda own: abs(self._size(own) - self._size(layer)))
        if nearest == full:
            return NOTHING
        own = there[nearest].layer(layer.index)
        return own if nearest == layer else own.gains()

    def _size(self, layer: LayerPlan) -> float:
        """Return the logarithm of the number of a layer's weights."""
        return math.log(sum(math.prod(shape) for shape in layer.shapes(self._config).values()))

    def _mean(self, plan: Plan) -> float:
        return fmean(self._size(layer) for layer in plan.layers)
