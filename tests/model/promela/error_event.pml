/*
 * The scenario error-event, design slot-holds-mark, as in
 * src/fanwise/lab/scenarios/{_kernel_group,_error_memory}.py: the same tasks, and one atomic block
 * for each step there.
 */

#define RAISERS 2

/* of the mark, which begins attached (M0 is before) */
#define M1 1
#define M2 2
#define M3 3
#define M4 4
#define M5 5
#define M6 6

/* of its slot */
#define IDLE    0
#define CLAIMED 1
#define QUEUED  2
#define FREED   3

byte mark = M1, mark_refs = 1;          /* the list's reference */
bool listed = true;                     /* by the group */
bool found = true;                      /* through the connector */

byte slot = IDLE, slot_count;
bool slot_object, queued;

bool descriptor = true, shutdown, group_freed;
byte users, group_refs = 2;             /* calls inside; the descriptor's reference and the mark's */

bool dead, work, reaping;               /* the reaper: what it is given, and what it does */
bool inside[RAISERS], before[RAISERS];  /* SRCU: who reads, and who the reaper waits for */

byte accepted, told, dropped;

inline use_slot() { assert(slot != FREED) }         /* no-use-after-free */

inline put_group() {
    assert(group_refs > 0);
    group_refs--;
    if :: group_refs == 0 -> group_freed = true :: else fi
}

inline put_mark() {
    assert(mark_refs > 0);                          /* refcount */
    mark_refs--;
    if
    :: mark_refs == 0 ->
        assert(mark == M3);                         /* declared-lifetimes */
        mark = M4;
        found = false;
        dead = true;
        work = true
    :: else
    fi
}

inline clear_slot() {
    use_slot();
    slot_count = 0;
    slot_object = false;
    slot = IDLE
}

inline leave() { inside[me] = false; before[me] = false }

proctype raiser(byte me) {
    bool go;
    atomic { inside[me] = found; go = found }
    if
    :: go ->
        atomic {
            use_slot();
            accepted++;
            slot_count++;
            if
            :: slot_count > 1 -> go = false; leave()
            :: else -> assert(slot == IDLE); slot = CLAIMED
            fi
        }
        if
        :: go ->
            atomic { use_slot(); slot_object = true }
            atomic {
                use_slot();
                if
                :: shutdown || mark_refs == 0 ->
                    dropped = dropped + slot_count;
                    clear_slot()
                :: else ->
                    mark_refs++;
                    slot = QUEUED;
                    queued = true
                fi;
                leave()
            }
        :: else
        fi
    :: else
    fi
}

proctype reader() {
    byte n, count;
    bool object;
    do
    :: n < 2 ->
        atomic {
            queued || !descriptor;
            if
            :: descriptor ->
                users++;
                queued = false;
                object = slot_object;
                count = slot_count;
                clear_slot()
            :: else -> break
            fi
        }
        atomic {
            assert(object && count > 0);            /* whole-record */
            told = told + count;
            put_mark();
            users--;
            n++
        }
    :: else -> break
    od
}

inline detach() {
    mark_refs++;
    if
    :: mark == M1 -> listed = false; mark = M2; mark_refs--
    :: else
    fi
}

inline free_mark() {
    if :: mark == M2 -> mark = M3 :: else fi;
    put_mark()
}

proctype remover() {
    bool go;
    atomic {
        go = descriptor && listed;
        if :: go -> users++; detach() :: else fi
    }
    if
    :: go -> atomic { free_mark(); users-- }
    :: else
    fi
}

proctype closer() {
    bool go, given;
    atomic { descriptor = false }
    atomic { users == 0; shutdown = true; go = listed; given = work || reaping }    /* G1 */
    if
    :: go ->
        atomic { assert(listed); detach() }                                         /* G2 */
        atomic { free_mark(); given = work || reaping }
    :: else
    fi;
    atomic { !given || !(work || reaping) }                                         /* G4 */
    atomic {                                                                        /* G5 */
        if
        :: queued -> queued = false; dropped = dropped + slot_count; clear_slot(); put_mark()
        :: else
        fi
    }
    atomic {                                                                        /* G7 */
#ifndef NO_ORDER
        assert(mark == M6);                         /* destruction-order */
#endif
        put_group()
    }
}

proctype reaper() {
    byte i;
end:
    do
    :: atomic {
            work;
            work = false;
            reaping = true;
            dead = false;
            mark = M5;
            do
            :: i < RAISERS -> before[i] = inside[i]; i++
            :: else -> i = 0; break
            od
        }
        atomic {
            !before[0] && !before[1];
            assert(slot == IDLE);                   /* declared-lifetimes */
            slot = FREED;
            mark = M6;
            put_group();
            reaping = false
        }
    od
}

init {
    atomic {
        run reaper();       /* first: it never ends, and those before it could not */
        run raiser(0); run raiser(1); run reader(); run remover(); run closer()
    }
    atomic {
        _nr_pr == 2 && mark == M6;
        assert(accepted == told + dropped);         /* no-lost-error */
        assert(group_freed && slot == FREED)        /* no-leak */
    }
}
