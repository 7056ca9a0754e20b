"""`portward diagnose`: what is the matter with an account and each of its machines, and the exact next step.

    gather.diagnose     finds the account, asks the kernel and the metrics
    sight               what this host does now with each machine, as `explain` says it
    outcome             whether that is what the policy says; pure
    meant               what an operator likely meant by a word that names no subscription
    facts               what is known, as values
    advice              facts → the matters of the account, each with its ways on; pure
    answer              all of it as one value for machines, and as lines for the support engineer; pure
    letter              the text that the customer gets; pure

Words are said in the language that is asked for, the codes (reasons, steps) never change.
"""
