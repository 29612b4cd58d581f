//! The number of malloc(3)'s arenas.

/// Allows eight arenas for each CPU, unless the user has set a number.
///
/// glibc allows as many by itself, but opens `/sys/devices/system/cpu/online` to count the CPUs when threads want a
/// ninth one. No other thread may allocate meanwhile.
#[cfg(target_env = "gnu")]
pub fn limit_arenas(cpus: usize) {
    let set = |name: &str, part: &str| {
        std::env::var_os(name).is_some_and(|value| value.to_string_lossy().contains(part))
    };
    if set("MALLOC_ARENA_MAX", "") || set("GLIBC_TUNABLES", "arena_max") {
        return;
    }
    let arenas = cpus.saturating_mul(8).try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: it takes two numbers, and the caller says that no other thread allocates meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
}

/// Other C libraries have no arenas.
#[cfg(not(target_env = "gnu"))]
pub fn limit_arenas(_cpus: usize) {}
