"""Forwarding database: which port was an address last seen on.

Buckets of one cache line; a key (VLAN and address in one word) can live only in the
bucket that its hash names, so a lookup has a fixed worst case. The hash has a secret
multiplier, or a guest could aim at somebody's bucket. `learn` refreshes the stamp;
an entry older than the ageing time is not found any more, and `expire` clears some
buckets between turns, as many as the time that has passed asks for.

A port may own `PORT.max_addresses` entries. At its limit, or when a bucket is full, an
address can only push out an expired one or the oldest learned entry of the port that
owns most of the bucket, its own port first: a guest that invents addresses pushes out
its own.

Shared by all workers. Readers take no lock: key, value, key again. Writers hold the
bucket's lock word (worker number + 1), which `free_locks` clears if its owner died.
Not here: multicast snooping.
"""

from typing import Final

from ports.base import PORT
from ports.native import (
    Record,
    add_u64,
    jit,
    load_acquire_u64,
    load_u32,
    load_u64,
    pause,
    sched_yield,
    store_release_u32,
    store_release_u64,
    store_u32,
    store_u64,
    swap_if_u32,
)
from ports.views import port_at
from vswitch.datapath.views import header_at, tally_at
from vswitch.records import (
    FDB,
    FDB_BUCKETS,
    FDB_PORT_MASK,
    FDB_STAMP_MASK,
    FDB_STAMP_SHIFT,
    FDB_STATIC,
    FDB_WAYS,
)

_BUCKET_SIZE: Final = FDB.itemsize
_VALUES: Final = 8 * FDB_WAYS
_LOCK: Final = _VALUES + 4 * FDB_WAYS
_HASH_BITS: Final = FDB_BUCKETS.bit_length() - 1
_HASH_SHIFT: Final = 64 - _HASH_BITS
_HASH_MASK: Final = FDB_BUCKETS - 1
_PORT_SIZE: Final = PORT.itemsize
_ADDRESSES: Final = PORT.fields["addresses"][1] if PORT.fields else 0

NOT_FOUND: Final = -1
_NO_KEY: Final = 0
_SPINS_BEFORE_YIELD: Final = 256
_MAX_SPINS: Final = 1 << 14
# Whose lock it is when no worker number is at hand: control operations.
CONTROL: Final = 1 << 16


@jit
def bucket_of(fdb: int, seed: int, key: int) -> int:
    """Address of the only bucket that may hold `key`."""
    index = ((key * seed) >> _HASH_SHIFT) & _HASH_MASK
    return fdb + index * _BUCKET_SIZE


@jit
def lookup(bucket: int, key: int, now_s: int, ageing_s: int) -> int:
    """Port slot behind `key`, or NOT_FOUND."""
    if key == _NO_KEY:
        return NOT_FOUND  # a guest may ask for it; it would match an empty way
    for way in range(FDB_WAYS):
        if load_u64(bucket + 8 * way) == key:
            value = load_u32(bucket + _VALUES + 4 * way)
            # Pairs with `_write`: the same key around the value means the value is its.
            if load_acquire_u64(bucket + 8 * way) != key:
                return NOT_FOUND
            if _is_expired(value, now_s, ageing_s):
                return NOT_FOUND
            return value & FDB_PORT_MASK
    return NOT_FOUND


@jit
def learn(
    ctx: Record, key: int, port: int, worker: int, now_s: int, tally: Record
) -> int:
    """Note that `key` was seen on `port` at `now_s`.

    Static entries stay where they are. Counts what happened in `tally`.

    Returns:
        1 if that was news, which takes a lock, else 0.
    """
    header = header_at(int(ctx["header"]), 0)
    ageing_s = int(header["ageing_s"])
    bucket = bucket_of(int(ctx["fdb"]), int(header["hash_seed"]), key)
    value = port | ((now_s & FDB_STAMP_MASK) << FDB_STAMP_SHIFT)
    way = _find(bucket, key)
    if way >= 0:
        seen = load_u32(bucket + _VALUES + 4 * way)
        if seen == value or (seen & FDB_STATIC) != 0:
            return 0  # the common case, without a lock
    if not _lock(bucket, worker + 1):
        return 0  # the next burst tries again
    way = _find(bucket, key)
    if way >= 0:
        old = load_u32(bucket + _VALUES + 4 * way)
        if (old & FDB_STATIC) == 0:
            old_port = old & FDB_PORT_MASK
            store_u32(bucket + _VALUES + 4 * way, value)
            if old_port != port:
                tally["fdb_moved"] += 1
                _count(int(ctx["ports"]), old_port, -1)
                _count(int(ctx["ports"]), port, 1)
    else:
        _insert(ctx, bucket, key, value, port, now_s, ageing_s, tally)
    store_release_u32(bucket + _LOCK, 0)
    return 1


@jit
def _insert(
    ctx: Record,
    bucket: int,
    key: int,
    value: int,
    port: int,
    now_s: int,
    ageing_s: int,
    tally: Record,
) -> None:
    """Find a place for a new learned key; the bucket is locked."""
    limit = int(port_at(int(ctx["ports"]), port)["max_addresses"])
    own = load_u64(_addresses(int(ctx["ports"]), port))
    way = _place(bucket, port, own >= limit, now_s, ageing_s)
    if way < 0:
        tally["fdb_refused"] += 1
        return
    if load_u64(bucket + 8 * way) != 0:
        old = load_u32(bucket + _VALUES + 4 * way)
        _count(int(ctx["ports"]), old & FDB_PORT_MASK, -1)
        if _is_expired(old, now_s, ageing_s):
            tally["fdb_expired"] += 1
        else:
            tally["fdb_evicted"] += 1
    _write(bucket, way, key, value)
    _count(int(ctx["ports"]), port, 1)
    tally["fdb_learned"] += 1


@jit
def _place(bucket: int, port: int, at_limit: bool, now_s: int, ageing_s: int) -> int:
    """The way a new entry of `port` may take, or -1.

    An empty or expired one; else, if the port is at its limit, its own oldest; else the
    oldest of the port that owns most ways here.
    """
    most = _owned(bucket, port)
    victim_port = port
    for way in range(FDB_WAYS):
        key = load_u64(bucket + 8 * way)
        value = load_u32(bucket + _VALUES + 4 * way)
        if key == 0:
            if not at_limit:
                return way
        elif (value & FDB_STATIC) == 0:
            own = (value & FDB_PORT_MASK) == port
            if _is_expired(value, now_s, ageing_s) and (own or not at_limit):
                return way
            owned = _owned(bucket, value & FDB_PORT_MASK)
            if owned > most:
                most = owned
                victim_port = value & FDB_PORT_MASK
    if at_limit:
        victim_port = port
    return _oldest(bucket, victim_port, now_s)


@jit
def _owned(bucket: int, port: int) -> int:
    owned = 0
    for way in range(FDB_WAYS):
        value = load_u32(bucket + _VALUES + 4 * way)
        if load_u64(bucket + 8 * way) != 0 and (value & FDB_STATIC) == 0:
            owned += int((value & FDB_PORT_MASK) == port)
    return owned


@jit
def _oldest(bucket: int, port: int, now_s: int) -> int:
    oldest = -1
    oldest_age = -1
    for way in range(FDB_WAYS):
        value = load_u32(bucket + _VALUES + 4 * way)
        if load_u64(bucket + 8 * way) == 0 or (value & FDB_STATIC) != 0:
            continue
        age = _age(value, now_s)
        if (value & FDB_PORT_MASK) == port and age > oldest_age:
            oldest = way
            oldest_age = age
    return oldest


@jit
def set_static(ctx: Record, key: int, port: int) -> int:
    """Pin `key` to `port`; 1, or 0 where the bucket is full of static entries."""
    bucket = bucket_of(
        int(ctx["fdb"]), int(header_at(int(ctx["header"]), 0)["hash_seed"]), key
    )
    if not _lock(bucket, CONTROL):
        return 0
    way = _find(bucket, key)
    if way < 0:
        way = _find(bucket, 0)
    for candidate in range(FDB_WAYS):
        value = load_u32(bucket + _VALUES + 4 * candidate)
        if way < 0 and (value & FDB_STATIC) == 0:
            way = candidate
    if way >= 0:
        _uncount(ctx, bucket, way)
        _write(bucket, way, key, port | FDB_STATIC)
    store_release_u32(bucket + _LOCK, 0)
    return int(way >= 0)


@jit
def remove(ctx: Record, key: int) -> int:
    """Forget `key`, learned or static; the number of entries removed."""
    bucket = bucket_of(
        int(ctx["fdb"]), int(header_at(int(ctx["header"]), 0)["hash_seed"]), key
    )
    if not _lock(bucket, CONTROL):
        return 0
    way = _find(bucket, key)
    if way >= 0:
        _clear(ctx, bucket, way)
    store_release_u32(bucket + _LOCK, 0)
    return int(way >= 0)


@jit
def flush(ctx: Record, port: int, also_static: int, begin: int, count: int) -> int:
    """Forget what is behind `port` (every port: -1) in `count` buckets from `begin`.

    Returns:
        The number of entries removed.
    """
    removed = 0
    for index in range(begin, begin + count):
        bucket = int(ctx["fdb"]) + index * _BUCKET_SIZE
        if _is_empty(bucket) or not _lock(bucket, CONTROL):
            continue
        for way in range(FDB_WAYS):
            value = load_u32(bucket + _VALUES + 4 * way)
            meant = port < 0 or (value & FDB_PORT_MASK) == port
            if also_static == 0 and (value & FDB_STATIC) != 0:
                meant = False
            if meant and load_u64(bucket + 8 * way) != _NO_KEY:
                _clear(ctx, bucket, way)
                removed += 1
        store_release_u32(bucket + _LOCK, 0)
    return removed


@jit
def expire(ctx: Record, begin: int, count: int, worker: int, now_s: int) -> int:
    """Clear expired entries of `count` buckets; the bucket to go on with."""
    ageing_s = int(header_at(int(ctx["header"]), 0)["ageing_s"])
    for step in range(count):
        index = (begin + step) & _HASH_MASK
        bucket = int(ctx["fdb"]) + index * _BUCKET_SIZE
        if not _has_expired(bucket, now_s, ageing_s) or not _lock(bucket, worker + 1):
            continue
        for way in range(FDB_WAYS):
            value = load_u32(bucket + _VALUES + 4 * way)
            if load_u64(bucket + 8 * way) != 0 and _is_expired(value, now_s, ageing_s):
                tally = tally_at(ctx, worker, value & FDB_PORT_MASK)
                tally["fdb_expired"] += 1
                _clear(ctx, bucket, way)
        store_release_u32(bucket + _LOCK, 0)
    return (begin + count) & _HASH_MASK


@jit
def free_locks(ctx: Record, dead: int) -> int:
    """Free the locks of a worker that died; how many there were.

    It may have been at a control operation. If another is under way elsewhere at this
    moment, it loses its lock: an entry may be wrong, where one that nobody ever frees
    would stop a bucket from learning.
    """
    freed = 0
    for index in range(FDB_BUCKETS):
        lock = int(ctx["fdb"]) + index * _BUCKET_SIZE + _LOCK
        owner = load_u32(lock)
        if owner in (dead + 1, CONTROL):
            store_release_u32(lock, 0)
            freed += 1
    return freed


@jit
def _has_expired(bucket: int, now_s: int, ageing_s: int) -> bool:
    for way in range(FDB_WAYS):
        value = load_u32(bucket + _VALUES + 4 * way)
        if load_u64(bucket + 8 * way) != 0 and _is_expired(value, now_s, ageing_s):
            return True
    return False


@jit
def _is_empty(bucket: int) -> bool:
    keys = 0
    for way in range(FDB_WAYS):
        keys |= load_u64(bucket + 8 * way)
    return keys == 0


@jit
def _find(bucket: int, key: int) -> int:
    for way in range(FDB_WAYS):
        if load_u64(bucket + 8 * way) == key:
            return way
    return -1


@jit
def _write(bucket: int, way: int, key: int, value: int) -> None:
    """Replace a way. Pairs with `lookup`: a key never stands beside a foreign value."""
    store_release_u64(bucket + 8 * way, 0)
    store_release_u32(bucket + _VALUES + 4 * way, value)
    store_release_u64(bucket + 8 * way, key)


@jit
def _clear(ctx: Record, bucket: int, way: int) -> None:
    _uncount(ctx, bucket, way)
    store_u64(bucket + 8 * way, 0)


@jit
def _uncount(ctx: Record, bucket: int, way: int) -> None:
    """Take a way that is about to go off its port's account."""
    value = load_u32(bucket + _VALUES + 4 * way)
    if load_u64(bucket + 8 * way) != 0 and (value & FDB_STATIC) == 0:
        _count(int(ctx["ports"]), value & FDB_PORT_MASK, -1)


@jit
def _addresses(ports: int, port: int) -> int:
    return ports + port * _PORT_SIZE + _ADDRESSES


@jit
def _count(ports: int, port: int, change: int) -> None:
    add_u64(_addresses(ports, port), change)


@jit
def _age(value: int, now_s: int) -> int:
    return (now_s - (value >> FDB_STAMP_SHIFT)) & FDB_STAMP_MASK


@jit
def _is_expired(value: int, now_s: int, ageing_s: int) -> bool:
    age = _age(value, now_s)
    # Another worker's clock may be a second ahead of ours: a huge age is a young one.
    return (value & FDB_STATIC) == 0 and ageing_s <= age < FDB_STAMP_MASK - 1


@jit
def _lock(bucket: int, owner: int) -> bool:
    """Lock a bucket; False if somebody held it for too long (he may be dead)."""
    for spin in range(_MAX_SPINS):
        if swap_if_u32(bucket + _LOCK, 0, owner) == 0:
            return True
        pause()
        if spin % _SPINS_BEFORE_YIELD == _SPINS_BEFORE_YIELD - 1:
            sched_yield()
    return False


def warm_up(ctx: Record) -> None:
    """Compile the control side's operations, on nothing: key 0 is the empty one."""
    set_static(ctx, _NO_KEY, 0)
    remove(ctx, _NO_KEY)
    flush(ctx, 0, 0, 0, 0)
