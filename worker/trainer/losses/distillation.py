"""Self-distillation: the model learns to answer as it would if it had been told more. For comments, and for
demonstrations with `method: "distill"`.

The teacher is the same weights, without gradient, shown the comment or the demonstration beside the question
(`worker.data.teacher`); both read the same answer y. At each token, q and p are the teacher's and the student's next
words: the K that the teacher finds likeliest (`worker.model.soft_targets.TOP`), and all others lumped into one:

    loss = 1/n sum_t KL(q_t | p_t),    KL(q | p) = sum_k q_k (log q_k - log p_k)
    d KL / d logit_j = p_j - q_j,      of a lumped word p_j - p_j q_r / p_r
    step = 1/n sum_t 1/2 sum_k |q_k - p_k|

As arXiv 2601.20802 (top-K with a lumped rest) and 2603.12273 for what users say in conversations;
2601.19897 for demonstrations. Those sample the answer from the student. Of a comment, the recorded answer is such a
sample. A demonstration is not: what is learnt of it is what the teacher expects along its words. KL(p | q), and a mean
of both, are used as well; KL(q | p) pulls towards what the student would never say (DESIGN.md, "Losses by kind").

There is no |d loss / d log p| of one token here; what stands for it is the probability that the loss wants elsewhere,
half the sum of |d loss / d logit| over the words: 0 where the teacher agrees, so that a comment that changes nothing
moves nothing, and at most 1.
"""

from worker.trainer.losses.terms import Answers, Term


def distillation(answers: Answers) -> Term:
    """Of an answer that a teacher has read."""
    return Term(answers.divergence, share=answers.moved)
