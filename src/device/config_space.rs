//! The device's configuration space: `struct virtio_fs_config` (virtio 1.3, section 5.11.4).

/// Longest mount tag in bytes.
pub const TAG_SIZE: usize = 36;
/// Bytes of the configuration space that are served: tag and number of request queues.
pub const SIZE: usize = TAG_SIZE + 4;

/// The configuration space of a device with this tag and number of request queues.
pub fn config_space(tag: &str, request_queues: u32) -> [u8; SIZE] {
    let mut space = [0; SIZE];
    space.iter_mut().zip(tag.bytes().take(TAG_SIZE)).for_each(|(to, from)| *to = from);
    space.iter_mut().skip(TAG_SIZE).zip(request_queues.to_le_bytes()).for_each(|(to, from)| *to = from);
    space
}

/// The part from `offset` on; what lies past the end reads as zero, as front ends differ in how
/// much they ask for.
pub fn read(space: &[u8; SIZE], offset: u32, size: u32) -> Vec<u8> {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let size = usize::try_from(size).unwrap_or(0);
    space.iter().copied().chain(std::iter::repeat(0)).skip(offset).take(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_and_queues_are_where_the_guest_looks() {
        let space = config_space("share", 4);
        assert_eq!(&space[..6], b"share\0");
        assert_eq!(&space[36..], &[4, 0, 0, 0]);
        assert_eq!(read(&space, 36, 8), [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read(&space, 0, 2), *b"sh");
        assert_eq!(read(&space, 300, 2), [0, 0]);
    }

    #[test]
    fn a_tag_of_full_length_has_no_nul() {
        let tag = "x".repeat(36);
        assert_eq!(&config_space(&tag, 1)[..36], tag.as_bytes());
    }
}
