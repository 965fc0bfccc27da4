"""What a frozen vision tower makes of each image, kept across epochs.

A frozen tower makes the same features of the same image in every epoch, so the first epoch can keep them and the others
read them. Four things could make that wrong, and each is refused or cannot happen: a tower that is trained
(`refuse_trainable`), features of other weights or settings (`fingerprint`), more than there is room for
(`FeatureCache.predict`, and a hard limit), and images that never come twice (`FeatureCache.end_epoch`).

    cache.open(fingerprint(tower.state_dict().items(), settings))
    cache.predict(bytes_per_example, examples)
    features = cache.get(key)
    if features is None:
        features = tower(image)
        cache.put(key, features)
    cache.end_epoch()
"""

from vlmembed.features.cache import FeatureCache, InMemory, Key
from vlmembed.features.disk import OnDisk
from vlmembed.features.tower import fingerprint, refuse_trainable

__all__ = ["FeatureCache", "InMemory", "Key", "OnDisk", "fingerprint", "refuse_trainable"]
