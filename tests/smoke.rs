mod common;
use lanefsd_frontend::Cut;
use lanefsd_frontend::client::ROOT;

#[test]
fn smoke() {
    let (mut backend, session) = common::serve(&[]);
    println!("{:x} {:x} {:?} {:?}", session.features(), session.protocol_features(), session.init_reply(), session.init_flags());
    std::fs::write(backend.path("hello"), "hello world").unwrap();
    let c = session.client();
    let e = c.lookup(ROOT, "hello").unwrap();
    assert_eq!(e.attr.size, 11);
    for cut in [Cut::Linux, Cut::Scattered, Cut::One, Cut::Bytes, Cut::Contiguous, Cut::Random(1), Cut::Random(2)] {
        let c = c.cut(cut);
        let o = c.open(e.nodeid, libc::O_RDWR).unwrap();
        assert_eq!(c.write(e.nodeid, o.fh, 6, b"lanes").unwrap(), 5);
        assert_eq!(c.read(e.nodeid, o.fh, 0, 100).unwrap(), b"hello lanes");
        c.release(e.nodeid, o.fh).unwrap();
    }
    assert_eq!(common::errno(c.lookup(ROOT, "nope")), libc::ENOENT);
    c.forget(e.nodeid, 1).unwrap();
    println!("fds {:?} rss {} thr {} cpu {:?} kicks {} calls {}", backend.descriptors().unwrap(), backend.resident_kib().unwrap(), backend.threads().unwrap(), backend.cpu_time().unwrap(), session.queue(1).kicks(), session.queue(1).calls());
    drop(session);
    backend.expect_success().unwrap();
}
