/*
 * The scenario eventfs, designs freed-flag and (-DRECHECK) freed-recheck, as in
 * src/fanwise/lab/scenarios/eventfs.py: the same tasks, and one atomic block for each step there.
 *
 * An ei is 0, or 1 for the one that is created again. An entry is a number in the order of making.
 */

#define NONE    255
#define EIS     2
#define ENTRIES 4       /* two walks of the opener and one of find build at most three */

/* of an ei and of its source */
#define LIVE     0
#define FREED    1
#define RELEASED 2      /* waits for those who walk a path, */
#define WAITS    3      /* then for those who list, */
#define GONE     4      /* and then its memory goes */

/* of an entry */
#define UNUSED   0
#define HASHED   1
#define UNHASHED 2
#define KILLED   3

byte ei_state[EIS] = LIVE, ei_refs[EIS], ei_ino[EIS];
byte source_refs[EIS];
bool source_flag[EIS], source_gone[EIS], removed[EIS];
bool built_dir[EIS], built_file[EIS];       /* what the cache ought to have */
byte present = NONE;                        /* the ei that the tree lists as "sched" */
byte inos = 1;                              /* the root has number 1 */

byte entry_state[ENTRIES], entry_users[ENTRIES], entry_ei[ENTRIES];
byte entry_child[ENTRIES] = NONE;           /* the hashed "enable" of a directory */
byte entry_dir[ENTRIES] = NONE;             /* of a file: its directory */
byte cached = NONE;                         /* the hashed "sched" */
byte entries;

hidden byte above, below;                   /* scratch of one atomic block */

bool event_mutex, eventfs_mutex;
byte rcu, srcu;                             /* readers */

inline reclaim() {
    byte r;
    r = 0;
    do
    :: r < EIS ->
        if :: ei_state[r] == RELEASED && rcu == 0 -> ei_state[r] = WAITS :: else fi;
        if :: ei_state[r] == WAITS && srcu == 0 -> ei_state[r] = GONE :: else fi;
        r++
    :: else -> break
    od;
    r = 0
}

inline put_source(e) {
    assert(source_refs[e] > 0);
    source_refs[e]--;
    if :: source_refs[e] == 0 -> source_gone[e] = true :: else fi
}

inline put_ei(e) {
    assert(ei_refs[e] > 0);
    ei_refs[e]--;
    if
    :: ei_refs[e] == 0 ->
        assert(ei_state[e] == FREED);
        ei_state[e] = RELEASED;
        put_source(e);
        reclaim()
    :: else
    fi
}

inline kill_dir(d) {
    if :: entry_state[d] == HASHED -> cached = NONE :: else fi;
    entry_state[d] = KILLED;
    put_ei(entry_ei[d])
}

inline put_dir(d) {
    entry_users[d]--;
    if :: entry_users[d] == 0 && entry_state[d] == UNHASHED -> kill_dir(d) :: else fi
}

inline kill_file(d) {
    above = entry_dir[d];
    if :: entry_state[d] == HASHED -> entry_child[above] = NONE :: else fi;
    entry_state[d] = KILLED;
    put_ei(entry_ei[d]);
    put_dir(above)
}

inline put_file(d) {
    entry_users[d]--;
    if :: entry_users[d] == 0 && entry_state[d] == UNHASHED -> kill_file(d) :: else fi
}

inline unhash_file(d) {
    entry_state[d] = UNHASHED;
    above = entry_dir[d];
    entry_child[above] = NONE;
    if :: entry_users[d] == 0 -> kill_file(d) :: else fi
}

inline unhash_dir(d) {
    entry_users[d]++;
    below = entry_child[d];
    if :: below != NONE -> unhash_file(below) :: else fi;
    entry_state[d] = UNHASHED;
    cached = NONE;
    put_dir(d)
}

inline leave_rcu() { rcu--; reclaim() }
inline leave_srcu() { srcu--; reclaim() }

inline use_ei(e) { assert(ei_state[e] != GONE) }

inline call(e) {
    assert(!removed[e]);            /* no-callback-after-removal */
    assert(!source_gone[e])
}

inline number(e) {
    use_ei(e);
    if
    :: ei_ino[e] == 0 ->
        inos++;
        ei_ino[e] = inos;
        assert(ei_ino[e] != 1 && ei_ino[0] != ei_ino[1])    /* unique-directory-inodes */
    :: else
    fi
}

inline make(e) {
    d = entries;
    entries++;
    entry_state[d] = HASHED;
    entry_users[d] = 1;
    entry_ei[d] = e;
    ei_refs[e]++
}

/* Leaves the entry of "sched" in d, or NONE. */
inline walk_dir() {
    atomic { rcu++; d = cached }
    if
    :: d != NONE ->
        atomic {
            use_ei(entry_ei[d]);
            if
            :: ei_state[entry_ei[d]] == LIVE && entry_state[d] == HASHED ->
                entry_users[d]++;
                hit = true
            :: else -> hit = false
            fi;
            leave_rcu()
        }
    :: else -> atomic { hit = false; leave_rcu() }
    fi;
    if
    :: hit
    :: else ->
        atomic {
            !eventfs_mutex;
            d = cached;
            if
            :: d != NONE && ei_state[entry_ei[d]] == LIVE ->
                entry_users[d]++
            :: else ->
                if :: d != NONE -> unhash_dir(d) :: else fi;
                d = NONE;
                if
                :: present != NONE ->
                    number(present);
                    assert(!built_dir[present]);            /* cached-stays-cached */
                    built_dir[present] = true;
                    make(present);
                    cached = d
                :: else
                fi
            fi
        }
    fi
}

/* Leaves the entry of "enable" below dir in d, or NONE. */
inline walk_file() {
    atomic { rcu++; d = entry_child[dir] }
    if
    :: d != NONE ->
        atomic {
            use_ei(entry_ei[d]);
            if
            :: ei_state[entry_ei[d]] == LIVE && entry_state[d] == HASHED ->
                entry_users[d]++;
                hit = true
            :: else -> hit = false
            fi;
            leave_rcu()
        }
    :: else -> atomic { hit = false; leave_rcu() }
    fi;
    if
    :: hit
    :: else ->
        atomic {
            !eventfs_mutex;
            use_ei(entry_ei[dir]);
            d = entry_child[dir];
            if
            :: d != NONE && ei_state[entry_ei[d]] == LIVE ->
                entry_users[d]++
            :: else ->
                if :: d != NONE -> unhash_file(d) :: else fi;
                d = NONE;
                if
                :: ei_state[entry_ei[dir]] == LIVE ->
                    call(entry_ei[dir]);
                    assert(!built_file[entry_ei[dir]]);     /* cached-stays-cached */
                    built_file[entry_ei[dir]] = true;
                    make(entry_ei[dir]);
                    entry_dir[d] = dir;
                    entry_child[dir] = d;
                    entry_users[dir]++
                :: else
                fi
            fi
        }
    fi
}

proctype opener() {
    byte d, dir, e;
    bool hit, got;
    walk_dir();
    dir = d;
    if
    :: dir != NONE ->
        walk_file();
        if
        :: d != NONE ->
            e = entry_ei[d];
#ifdef RECHECK
            atomic {
                !event_mutex;
                assert(!source_gone[e]);
                if
                :: !source_flag[e] -> source_refs[e]++; call(e); got = true
                :: else -> got = false
                fi
            }
#else
            atomic { call(e); source_refs[e]++; got = true }
#endif
            if
            :: got ->
                atomic {
                    !event_mutex;
                    assert(!source_gone[e]);
                    if :: !source_flag[e] -> call(e) :: else fi
                }
                atomic { put_source(e); put_file(d); put_dir(dir) }
            :: else -> atomic { put_file(d); put_dir(dir) }
            fi
        :: else -> atomic { put_dir(dir) }
        fi
    :: else
    fi
}

proctype remover() {
    atomic { !event_mutex; event_mutex = true }
    atomic { !eventfs_mutex; eventfs_mutex = true; ei_state[0] = FREED }
    atomic { present = NONE; put_ei(0); eventfs_mutex = false }
    atomic { source_flag[0] = true; removed[0] = true; put_source(0); event_mutex = false }
    atomic { present = 1 }
}

inline shrink() {
    d = 0;
    do
    :: d < entries && !(entry_users[d] == 0 && (entry_state[d] == HASHED || entry_state[d] == UNHASHED)) -> d++
    :: else -> break
    od;
    if
    :: d < entries && entry_dir[d] == NONE -> built_dir[entry_ei[d]] = false; kill_dir(d)
    :: d < entries && entry_dir[d] != NONE -> built_file[entry_ei[d]] = false; kill_file(d)
    :: else
    fi
}

proctype shrinker() {
    byte d;
    atomic { shrink() }
    atomic { shrink() }
}

proctype find() {
    byte d, e;
    bool hit;
    atomic { !eventfs_mutex; srcu++; e = present }
    if
    :: e != NONE ->
        atomic { !eventfs_mutex; number(e); leave_srcu() }
        walk_dir();
        if
        :: d != NONE ->
            atomic { assert(ei_ino[entry_ei[d]] != 1) }      /* loop-free-find */
            atomic {
                !eventfs_mutex;
                use_ei(entry_ei[d]);
                if :: ei_state[entry_ei[d]] == LIVE -> call(entry_ei[d]) :: else fi;
                put_dir(d)
            }
        :: else
        fi
    :: else -> leave_srcu()
    fi
}

init {
    byte d;
    atomic {
        ei_refs[0] = 1; ei_refs[1] = 1;
        source_refs[0] = 2; source_refs[1] = 2;
        present = 0;
        run opener(); run remover(); run shrinker(); run find()
    }
    atomic {
        _nr_pr == 1;
        /* name-leads-to-present */
        assert(cached == NONE || ei_state[entry_ei[cached]] != LIVE || entry_ei[cached] == present);
        /* no-leak: with the caches dropped, what is left is what the tree has */
        shrink(); shrink(); shrink();
        assert(ei_state[0] == GONE && source_gone[0] && ei_refs[1] == 1 && source_refs[1] == 2)
    }
}
