from vlmembed.data.tasks import Embedding, Reranking
from vlmembed.types import Chunking
class _Base:
    chunking = Chunking()
    distinct_queries = property(lambda self: self.task.distinct_queries)
    teacher_scores = False
    def _c(self): return self.task.collator(self.preprocessor, self.chunking.size, self.chunking.tokens, self.chunking.patch_cost)
    def __call__(self, examples): return self._c()(examples)
    def check(self, example): self._c().check(example)
    def load(self, value, split): return self.task.load(value, split)
    def loader(self, evaluation, size, rank, world, **o): return self.task.loader(evaluation, self.preprocessor, size, rank, world, **o)
class ItemCollator(_Base):
    def __init__(self, preprocessor, teacher_scores=False): self.preprocessor, self.task, self.teacher_scores = preprocessor, Embedding(teacher_scores), teacher_scores
class PairCollator(_Base):
    def __init__(self, preprocessor, label_spec, in_batch_negatives=0, by_document=False): self.preprocessor, self.task = preprocessor, Reranking(label_spec, by_document, in_batch_negatives)
Collator = _Base
