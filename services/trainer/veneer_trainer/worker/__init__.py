"""The worker: a process of its own that trains, evaluates and exports what the trainer hands out.

Two processes. The parent (`__main__`, `keeper`) keeps the lease: it speaks WorkerService, moves checkpoints and
adapters, runs evaluations, and never imports torch. Its child (`child`) computes training steps, so that neither a busy
step nor one that dies can stop a heartbeat. They speak `messages`, over a socket that only they hold.
"""
