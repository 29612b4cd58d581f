//! FORGET and BATCH_FORGET: each count goes down once. [`Trial::end`] checks that.

use std::fs;

use crate::trial::{Trial, at_each_moment};

/// Looks a file of the host up so often.
fn look(trial: &Trial, name: &str, lookups: usize) -> u64 {
    fs::write(trial.path(name), "").unwrap();
    (0..lookups).map(|_| trial.look(name)).last().unwrap()
}

#[test]
fn forget_of_some_lookups() {
    at_each_moment(&[], |trial| {
        let node = look(trial, "file", 5);
        trial.die("FORGET");
        trial.client().forget(node, 3).unwrap();
        trial.forgets(node, 3);
    });
}

#[test]
fn forget_of_all_lookups() {
    at_each_moment(&[], |trial| {
        let node = look(trial, "file", 5);
        trial.die("FORGET");
        trial.client().forget(node, 5).unwrap();
        trial.forgets(node, 5);
        assert!(trial.client().getattr(node).is_err());
        // Another node, not the one that was forgotten.
        assert_ne!(trial.look("file"), node);
    });
}

/// A file that is open when it is forgotten keeps its handle.
#[test]
fn forget_of_an_open_file() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        trial.die("FORGET");
        trial.client().forget(node, 1).unwrap();
        trial.forgets(node, 1);
        trial.client().release(node, fh).unwrap();
    });
}

fn batch(call: u32) {
    at_each_moment(&[], |trial| {
        let nodes: Vec<u64> = (0..10).map(|number| look(trial, &format!("file-{number}"), 4)).collect();
        // Some to the last lookup, and one of them in two items.
        let mut items: Vec<(u64, u64)> =
            nodes.iter().zip(1..).map(|(&node, number)| (node, 1 + number % 4)).collect();
        items.insert(7, (nodes[0], 1));
        trial.die_at("FORGET", call);
        trial.client().forget_batch(&items).unwrap();
        for (node, lookups) in items {
            trial.forgets(node, lookups);
        }
        for node in nodes {
            assert_eq!(trial.client().getattr(node).is_ok(), trial.lookups(node) > 0);
        }
    });
}

#[test]
fn batch_forget_at_its_first_item() {
    batch(1);
}

#[test]
fn batch_forget_in_the_middle() {
    batch(6);
}

#[test]
fn batch_forget_at_the_second_item_of_a_node() {
    batch(8);
}

#[test]
fn batch_forget_at_its_last_item() {
    batch(11);
}
