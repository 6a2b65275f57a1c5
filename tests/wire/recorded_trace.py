"""A sub-buffer of Linux 6.18 on x86-64: sh runs ./bin/true in a subshell, then sleep."""

import base64
import zlib

PAGE = zlib.decompress(
    base64.b64decode(
        "eNpbZMxiGMrDwHCCkQEMgEyGs0B8XB8oBsQFlSUZ+XkMqMARlevj78JwhgGiHpue4gwGDNBupMeQywhR"
        "L8LAAdern5SZpw/U0LPAnvEs1MyT+tjNYGBQYETmnZntBXbHSRx6SopKU9FNWHFBFOyOk2B3cMP16oEd"
        "AtFxct1ehkKoGnQzQGIVQBrkkDNGMQwwN5/C5Wa0sOO5Kwx0swpYPTY9xTmpqQXobn4pDnbzKaibYXoh"
        "YYdFwygYBaNgFIyCUTAKRsEoGAWjYBSMghEPAD+LRhM="
    )
)
TOLD = [
    (13560034112418, "task/task_newtask", 12231, 12232, b"python", 16640),
    (13560034252316, "task/task_rename", 12232, b"sh"),
    (13560034346928, "sched/sched_process_exec", 12232, 12232, b"/bin/sh"),
    (13560035001524, "task/task_newtask", 12232, 12233, b"sh", 18874368),
    (13560035154322, "task/task_rename", 12233, b"true"),
    (13560035198999, "sched/sched_process_exec", 12233, 12233, b"./bin/true"),
    (13560035587469, "sched/sched_process_exit", 12233, b"true"),
    (13560035776291, "task/task_newtask", 12232, 12234, b"sh", 16640),
    (13560035816971, "task/task_rename", 12234, b"sleep"),
    (13560035865944, "sched/sched_process_exec", 12234, 12234, b"/bin/sleep"),
]
