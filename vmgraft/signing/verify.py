"""The verifier: evidence and a policy in, a report out. It reads nothing itself and decides once.

The steps, in order; the same numbers stand in the code. Each ends in one named check of the report.

 1. ``format``        the record is structurally sound
 2. ``envelope``      there is exactly one, and it is well-formed
 3. ``signature``     one by a known or certified key is valid, and none that names a known key is not
 4. ``statement``     the signed bytes, and no others, parse as a statement
 5. ``payloads``      every manifest and module has the signed digest and the signed facts
 6. ``content``       the guest content has the signed digests
 7. ``scope``         exactly one trust policy applies to this image and these extensions
 8. ``authenticity``  the keys that policy demands, or keys certified for it, have signed, counted by distinct key
 9. ``expiry``        statement and needed certificates are valid at this time, certificates also at a trusted timestamp
10. ``revocation``    no key or certificate needed, statement, payload or generation is revoked
11. ``rollback``      no extension is below the demanded or remembered security version, or too far above the latter
12. ``policy``        the policy file itself is in force
13. ``binding``       the statement is bound to the image where the policy demands it
14. ``capabilities``  everything declared is granted
15. ``conflicts``     no two extensions claim the same range
16. ``required``      every required extension is there

A step whose ground is missing is skipped, never passed. Steps 1 to 6 are integrity, 7 and 8 authenticity, 9 to 11
freshness, 12 to 16 policy; the first failure in this order names the error. Steps 8 to 11, 14 and 16 are those that a
policy may turn into a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from vmgraft.errors import ExpiredError, UntrustedSignerError
from vmgraft.signing.contract import Evidence, Report, TreeNames
from vmgraft.signing.integrity import CHECKS, Run, expiry_problem
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import Policy
from vmgraft.signing.rules import SignatureRule, Vouch
from vmgraft.signing.times import require_zone

#: Checks that a verification never does without.
NEEDED = tuple(name for name in CHECKS if name != "content")
#: Checks that ``self_check`` never does without.
_OF_SELF_CHECK = ("format", "envelope", "signature", "statement", "payloads", "authenticity", "expiry")


def verify_evidence(
    evidence: Evidence,
    policy: Policy,
    *,
    image_name: str,
    now: datetime,
    check_content: bool = True,
    memory: Memory | None = None,
    tree: TreeNames | None = None,
) -> Report:
    """Verify a graft against a trust policy; every check is reported, also after a failure.

    Args:
        evidence: The graft as found.
        policy: The trust policy.
        image_name: File name of the image, for ``name:`` scopes; folders in front of it are ignored.
        now: The time to judge by, with its zone.
        check_content: Read and hash the whole guest content. A host that checks each block against the signed tree when
            it is first read says False; nobody else should.
        memory: The highest security versions that were accepted before, where a host keeps them. It is only read.
        tree: A content tree from wherever, that the host will hold every block against before it uses it. Where it is
            the signed one the content is not read now, and the ``content`` check says so; else it is read as ever. A
            signed flat SHA-256 is not looked at then: the tree names the same content.

    Raises:
        UsageError: ``now`` has no zone.
    """
    judgement = judge_evidence(
        evidence, policy, image_name=image_name, now=now, check_content=check_content, memory=memory, tree=tree
    )
    return judgement.run.report(NEEDED)


def judge_evidence(
    evidence: Evidence,
    policy: Policy,
    *,
    image_name: str,
    now: datetime,
    check_content: bool = True,
    memory: Memory | None = None,
    tree: TreeNames | None = None,
) -> Judgement:
    """Make every check and return all that was found out; arguments and errors as ``verify_evidence``."""
    keys = [named.key for named in policy.keys]
    run = Run(evidence, keys, require_zone(now), check_content, policy.authorities, tree=tree)
    run.integrity()
    judgement = Judgement(run, policy, image_name.rsplit("/", 1)[-1], memory)
    judgement.steps()
    return judgement


def judge_again(judgement: Judgement, policy: Policy) -> Judgement:
    """Judge what was judged before under another policy, with the same keys and trust stores, at little cost.

    What is left of the first judgement's budget is all there is: what cannot be answered with it counts as not trusted,
    and ``run.signers.budget.refused`` rises.

    Raises:
        ValueError: the keys or the trust stores differ.
    """
    before = judgement.policy
    if [named.key for named in policy.keys] != judgement.run.keys or policy.stores != before.stores:
        raise ValueError("other signatures may count under this policy")
    again = Judgement(judgement.run.fork(), policy, judgement.image_name, judgement.memory)
    again.steps()
    return again


def self_check(
    evidence: Evidence, public_keys: Sequence[PublicKey], *, now: datetime, check_content: bool = True
) -> Report:
    """Verify what was just written: integrity, and that each of the keys has signed.

    Looks at no policy, so it grants nothing and the report lists no extensions.

    Raises:
        UsageError: ``now`` has no zone.
    """
    run = Run(evidence, public_keys, require_zone(now), check_content)
    run.integrity()
    if run.statement is not None:
        rule = SignatureRule(frozenset(public_keys), frozenset(), 0)
        signed = [Vouch(key) for key in run.signers.valid]
        run.settle("authenticity", UntrustedSignerError, rule.problem(signed), "every key has signed")
        run.settle("expiry", ExpiredError, expiry_problem(run.statement, run.now), "valid at this time")
        run.trusted = run.signers.valid
    return run.report(_OF_SELF_CHECK)
