//! Translation of user and group ids between guest and host (`--translate-uid` and `--translate-gid`).
//!
//! The two directions are independent. An id without a rule keeps its number.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use thiserror::Error;

use fuse_protocol::ids::{GuestGid, GuestUid};

/// A user id of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostUid(pub u32);

/// A group id of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostGid(pub u32);

/// Users of guest and host.
pub type UidMap = IdMap<GuestUid, HostUid>;
/// Groups of guest and host.
pub type GidMap = IdMap<GuestGid, HostGid>;

/// Why rules cannot be a map.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum IdMapError {
    /// A rule cannot be parsed.
    #[error(
        "\"{0}\" is not a rule: give map:GUEST:HOST:COUNT, guest:GUEST:HOST:COUNT, host:HOST:GUEST:COUNT, \
         squash-guest:GUEST:HOST:COUNT, squash-host:HOST:GUEST:COUNT or forbid-guest:GUEST:COUNT"
    )]
    Syntax(String),
    /// There are not so many ids.
    #[error("{0} reaches past 4294967294, the last id there is")]
    PastEnd(IdRule),
    /// Two rules for the same ids.
    #[error("{second} and {first} speak of the same {side} ids: shorten one of them")]
    Overlap {
        /// The one that was given first.
        first: IdRule,
        /// The other one.
        second: IdRule,
        /// Where the ids are from: guest or host.
        side: &'static str,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Guest,
    Host,
    SquashGuest,
    SquashHost,
    ForbidGuest,
    Map,
}

impl Kind {
    const ALL: [(Kind, &'static str); 6] = [
        (Kind::Guest, "guest"),
        (Kind::Host, "host"),
        (Kind::SquashGuest, "squash-guest"),
        (Kind::SquashHost, "squash-host"),
        (Kind::ForbidGuest, "forbid-guest"),
        (Kind::Map, "map"),
    ];

    fn name(self) -> &'static str {
        Kind::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

/// One rule as a user types it. The count may be 0, which maps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRule {
    kind: Kind,
    from: u32,
    /// Unused for forbidden ids.
    to: u32,
    count: u32,
}

impl FromStr for IdRule {
    type Err = IdMapError;

    /// The kind and its numbers. The character after the kind separates the numbers, too.
    fn from_str(text: &str) -> Result<IdRule, IdMapError> {
        let syntax = || IdMapError::Syntax(text.to_owned());
        let in_kind = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let separator = text.chars().find(|c| !in_kind(*c)).ok_or_else(syntax)?;
        let mut fields = text.split(separator);
        let name = fields.next().unwrap_or_default().to_ascii_lowercase();
        let kind = Kind::ALL.iter().find(|(_, known)| *known == name).ok_or_else(syntax)?.0;
        let numbers: Vec<u32> =
            fields.map(|field| field.parse().map_err(|_| syntax())).collect::<Result<_, _>>()?;
        match (kind, numbers.as_slice()) {
            (Kind::ForbidGuest, &[from, count]) => Ok(IdRule { kind, from, to: 0, count }),
            (Kind::ForbidGuest, _) => Err(syntax()),
            (_, &[from, to, count]) => Ok(IdRule { kind, from, to, count }),
            _ => Err(syntax()),
        }
    }
}

impl fmt::Display for IdRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::ForbidGuest => write!(f, "forbid-guest:{}:{}", self.from, self.count),
            kind => write!(f, "{}:{}:{}:{}", kind.name(), self.from, self.to, self.count),
        }
    }
}

/// The translation of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// To as many ids from this one on.
    From(u32),
    /// All to this one.
    One(u32),
    /// None may be used.
    Forbidden,
}

/// A range of ids, both ends included, and its translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    last: u32,
    target: Target,
    /// Where it comes from, for messages.
    rule: IdRule,
}

impl Range {
    /// `None` for a rule that speaks of no id.
    fn new(rule: IdRule, first: u32, target: Target) -> Result<Option<Range>, IdMapError> {
        let past_end = || IdMapError::PastEnd(rule);
        let Some(more) = rule.count.checked_sub(1) else { return Ok(None) };
        // u32::MAX is no id: system calls take it for "unchanged".
        let end = |start: u32| start.checked_add(more).filter(|last| *last != u32::MAX).ok_or_else(past_end);
        match target {
            Target::From(start) => drop(end(start)?),
            Target::One(u32::MAX) => return Err(past_end()),
            Target::One(_) | Target::Forbidden => {}
        }
        Ok(Some(Range { first, last: end(first)?, target, rule }))
    }
}

/// One direction: ranges that do not overlap, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Direction(Vec<Range>);

impl Direction {
    fn add(&mut self, range: Option<Range>, side: &'static str) -> Result<(), IdMapError> {
        let Some(range) = range else { return Ok(()) };
        let at = self.0.partition_point(|other| other.last < range.first);
        if let Some(other) = self.0.get(at).filter(|other| other.first <= range.last) {
            return Err(IdMapError::Overlap { first: other.rule, second: range.rule, side });
        }
        self.0.insert(at, range);
        Ok(())
    }

    /// What `id` becomes; `None` if it is forbidden.
    fn apply(&self, id: u32) -> Option<u32> {
        let at = self.0.partition_point(|range| range.last < id);
        match self.0.get(at).filter(|range| range.first <= id) {
            None => Some(id),
            Some(range) => match range.target {
                // Neither wraps: the range's end was looked at when it was made.
                Target::From(start) => Some(start.wrapping_add(id.wrapping_sub(range.first))),
                Target::One(one) => Some(one),
                Target::Forbidden => None,
            },
        }
    }
}

/// A number of one side, guest or host.
pub trait Id: Copy {
    /// The id with this number.
    fn from_number(number: u32) -> Self;
    /// Its number.
    fn number(self) -> u32;
}

macro_rules! ids {
    ($($name:ty),*) => {$(
        impl Id for $name {
            fn from_number(number: u32) -> Self {
                Self(number)
            }
            fn number(self) -> u32 {
                self.0
            }
        }
    )*};
}

ids!(GuestUid, GuestGid, HostUid, HostGid);

/// Ids of the guest (`G`) and of the host (`H`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap<G, H> {
    to_host: Direction,
    to_guest: Direction,
    ids: PhantomData<fn(G) -> H>,
}

impl<G, H> Default for IdMap<G, H> {
    /// Every id is the same on both sides.
    fn default() -> IdMap<G, H> {
        IdMap { to_host: Direction::default(), to_guest: Direction::default(), ids: PhantomData }
    }
}

impl<G: Id, H: Id> IdMap<G, H> {
    /// The map that rules make.
    pub fn new(rules: &[IdRule]) -> Result<IdMap<G, H>, IdMapError> {
        let mut map = IdMap::default();
        for &rule in rules {
            let IdRule { kind, from, to, .. } = rule;
            let (guest, host) = match kind {
                Kind::Guest => (Some((from, Target::From(to))), None),
                Kind::SquashGuest => (Some((from, Target::One(to))), None),
                Kind::ForbidGuest => (Some((from, Target::Forbidden)), None),
                Kind::Host => (None, Some((from, Target::From(to)))),
                Kind::SquashHost => (None, Some((from, Target::One(to)))),
                Kind::Map => (Some((from, Target::From(to))), Some((to, Target::From(from)))),
            };
            if let Some((first, target)) = guest {
                map.to_host.add(Range::new(rule, first, target)?, "guest")?;
            }
            if let Some((first, target)) = host {
                map.to_guest.add(Range::new(rule, first, target)?, "host")?;
            }
        }
        Ok(map)
    }

    /// The host's id for one of the guest's; `None` if the guest must not use it.
    pub fn to_host(&self, id: G) -> Option<H> {
        self.to_host.apply(id.number()).map(H::from_number)
    }

    /// The id that the guest sees for one of the host's.
    pub fn to_guest(&self, id: H) -> G {
        // No rule forbids the host anything.
        G::from_number(self.to_guest.apply(id.number()).unwrap_or(id.number()))
    }

    /// Whether every id is the same on both sides.
    pub fn is_identity(&self) -> bool {
        self.to_host.0.is_empty() && self.to_guest.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(rules: &[&str]) -> Result<UidMap, IdMapError> {
        let rules: Vec<IdRule> = rules.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?;
        IdMap::new(&rules)
    }

    fn host(map: &UidMap, guest: u32) -> Option<u32> {
        map.to_host(GuestUid(guest)).map(|id| id.0)
    }

    fn guest(map: &UidMap, host: u32) -> u32 {
        map.to_guest(HostUid(host)).0
    }

    #[test]
    fn without_rules_ids_stay() {
        let map = map(&[]).unwrap();
        assert!(map.is_identity());
        for id in [0, 1, 1000, u32::MAX - 1, u32::MAX] {
            assert_eq!((host(&map, id), guest(&map, id)), (Some(id), id));
        }
    }

    #[test]
    fn each_kind_translates_as_documented() {
        let rules = ["guest:1000:5000:10", "squash-guest:2000:7:100", "forbid-guest:0:1000"];
        let to_host = map(&rules).unwrap();
        for (from, to) in [
            (999, None),
            (1000, Some(5000)),
            (1009, Some(5009)),
            (1010, Some(1010)),
            (2000, Some(7)),
            (2099, Some(7)),
            (2100, Some(2100)),
        ] {
            assert_eq!(host(&to_host, from), to, "{from}");
            assert_eq!(guest(&to_host, from), from, "the other direction is not concerned");
        }
        let to_guest = map(&["host:5000:1000:10", "squash-host:0:65534:1000"]).unwrap();
        for (from, to) in [(4999, 4999), (5000, 1000), (5009, 1009), (5010, 5010), (0, 65534), (999, 65534)] {
            assert_eq!(guest(&to_guest, from), to, "{from}");
            assert_eq!(host(&to_guest, from), Some(from));
        }
        let both = map(&["map:0:100000:65536"]).unwrap();
        assert_eq!(
            (host(&both, 0), host(&both, 65535), host(&both, 65536)),
            (Some(100_000), Some(165_535), Some(65536))
        );
        assert_eq!(
            (guest(&both, 99_999), guest(&both, 100_000), guest(&both, 165_536)),
            (99_999, 0, 165_536)
        );
    }

    #[test]
    fn a_single_user_with_all_others_forbidden() {
        // What Incus passes.
        let map = map(&["forbid-guest:0:1000", "map:1000:1000:1", "forbid-guest:1001:4294966294"]).unwrap();
        assert_eq!(host(&map, 1000), Some(1000));
        for id in [0, 999, 1001, u32::MAX - 1] {
            assert_eq!(host(&map, id), None, "{id}");
        }
    }

    #[test]
    fn overlaps_are_refused() {
        for rules in [
            ["map:0:0:10", "forbid-guest:9:1"],
            ["guest:10:0:10", "squash-guest:0:5:11"],
            ["forbid-guest:5:1", "guest:0:100:10"],
            ["host:0:100:10", "map:100:9:1"],
            ["squash-host:0:1:4294967295", "host:4294967294:3:1"],
        ] {
            let error = map(&rules).unwrap_err();
            assert!(matches!(error, IdMapError::Overlap { .. }), "{rules:?}: {error}");
            let text = error.to_string();
            assert!(text.contains(rules[0]) && text.contains(rules[1]), "{text}");
        }
        // Neighbours do not overlap, nor do the two directions, nor targets.
        map(&["guest:0:0:10", "guest:10:0:10", "host:0:0:20"]).unwrap();
        map(&["map:5:5:0", "map:0:0:10"]).unwrap();
    }

    #[test]
    fn ranges_end_with_the_last_id() {
        for good in ["map:0:0:4294967295", "guest:4294967294:0:1", "squash-host:0:4294967294:4294967295"] {
            map(&[good]).unwrap();
        }
        for bad in [
            "map:1:0:4294967295",
            "map:0:1:4294967295",
            "host:4294967295:0:1",
            "guest:4294967295:5:1",
            "squash-guest:0:4294967295:1",
            "forbid-guest:2001:4294967295",
        ] {
            let rule = bad.parse().unwrap();
            assert_eq!(map(&[bad]), Err(IdMapError::PastEnd(rule)), "{bad}");
        }
    }

    #[test]
    fn a_malformed_rule_is_refused() {
        for bad in [
            "",
            ":",
            "map",
            "map:",
            "map:1:2",
            "map:1:2:3:4",
            "map:1:2:3:",
            "forbid-guest:1:2:3",
            "1:2:3",
            "map:-1:2:3",
            "map:1:2:4294967296",
            "map:1/2/3",
            "squash:1:2:3",
            "map: 1:2:3",
        ] {
            assert_eq!(bad.parse::<IdRule>(), Err(IdMapError::Syntax(bad.to_owned())), "{bad}");
        }
        assert_eq!("MAP,1,2,3".parse::<IdRule>().unwrap().to_string(), "map:1:2:3");
    }

    fn any_rule() -> impl Strategy<Value = IdRule> {
        let id = prop_oneof![0..50u32, (u32::MAX - 50)..=u32::MAX, any::<u32>()];
        let count = prop_oneof![0..20u32, (u32::MAX - 20)..=u32::MAX, any::<u32>()];
        (0..Kind::ALL.len(), id.clone(), id, count).prop_map(|(kind, from, to, count)| {
            let kind = Kind::ALL[kind].0;
            IdRule { kind, from, to: if kind == Kind::ForbidGuest { 0 } else { to }, count }
        })
    }

    proptest! {
        /// Total: any text is a rule or refused, and a rule's text is the rule again.
        #[test]
        fn any_text_parses(text in "(map|guest|forbid-guest|squash-host)?[:,/0-9a-z-]{0,20}") {
            if let Ok(rule) = text.parse::<IdRule>() {
                prop_assert_eq!(rule.to_string().parse::<IdRule>(), Ok(rule));
            }
        }

        #[test]
        fn a_rule_parses_from_its_text(rule in any_rule()) {
            prop_assert_eq!(rule.to_string().parse::<IdRule>(), Ok(rule));
        }

        /// The table does what the rules say one by one, in whatever order they come.
        #[test]
        fn the_table_is_the_rules(
            rules in proptest::collection::vec(any_rule(), 0..6),
            ids in proptest::collection::vec(prop_oneof![0..80u32, (u32::MAX - 80)..=u32::MAX, any::<u32>()], 20),
        ) {
            let Ok(map) = UidMap::new(&rules) else { return Ok(()) };
            let reversed: Vec<_> = rules.iter().rev().copied().collect();
            prop_assert_eq!(&UidMap::new(&reversed), &Ok(map.clone()));
            for id in ids {
                let wide = u64::from(id);
                let covers = |rule: &IdRule, from: u32| wide >= u64::from(from) && wide < u64::from(from) + u64::from(rule.count);
                let mut expected = Some(wide);
                for rule in &rules {
                    match rule.kind {
                        Kind::Guest | Kind::Map if covers(rule, rule.from) =>
                            expected = Some(wide - u64::from(rule.from) + u64::from(rule.to)),
                        Kind::SquashGuest if covers(rule, rule.from) => expected = Some(rule.to.into()),
                        Kind::ForbidGuest if covers(rule, rule.from) => expected = None,
                        _ => {}
                    }
                }
                prop_assert_eq!(host(&map, id).map(u64::from), expected);
            }
        }

        /// What `map` sends to the host comes back as it was.
        #[test]
        fn map_goes_both_ways(from in 0..5000u32, to in 0..u32::MAX - 5000, count in 1..1000u32, at in 0..1000u32) {
            let rule = IdRule { kind: Kind::Map, from, to, count };
            let map = UidMap::new(&[rule]).unwrap();
            let id = GuestUid(from + at % count);
            prop_assert_eq!(map.to_guest(map.to_host(id).unwrap()), id);
        }

        /// No id ever becomes u32::MAX, which is none.
        #[test]
        fn no_id_gets_lost(rules in proptest::collection::vec(any_rule(), 0..6), id in 0..u32::MAX) {
            if let Ok(map) = UidMap::new(&rules) {
                prop_assert_ne!(host(&map, id), Some(u32::MAX));
                prop_assert_ne!(guest(&map, id), u32::MAX);
            }
        }
    }
}
