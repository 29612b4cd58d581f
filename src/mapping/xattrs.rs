//! Names of extended attributes on the host for those of the guest (`--xattrmap`).
//!
//! A list of rules in virtiofsd's language, of which the first one that matches a name counts.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::str::FromStr;

use thiserror::Error;

/// Longest name of an attribute (`XATTR_NAME_MAX`).
const NAME_MAX: usize = 255;

/// Why a text is no list of rules. Rules are counted from 1.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum XattrMapError {
    /// There is not one rule.
    #[error("it has no rule")]
    Empty,
    /// The text ends within a rule.
    #[error("rule {0} is not complete: it has the form :TYPE:SCOPE:KEY:PREPEND: or :map:KEY:PREPEND:")]
    Incomplete(usize),
    /// The type is unknown.
    #[error("rule {0} has the unknown type \"{1}\": it is prefix, ok, bad, unsupported or map")]
    Type(usize, String),
    /// The scope is unknown.
    #[error("rule {0} has the unknown scope \"{1}\": it is client, server or all")]
    Scope(usize, String),
    /// A name cannot contain a NUL.
    #[error("rule {0} has a NUL in it")]
    Nul(usize),
    /// Rules behind a rule of type map would never be reached.
    #[error("rule {0} is of type map and has to be the last one")]
    MapNotLast(usize),
    /// Some names would match no rule.
    #[error("no rule matches all other names of the {0}: end with :ok:all::: or :bad:all:::")]
    Open(&'static str),
}

/// Why the guest cannot have an attribute of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It must not be used.
    Bad,
    /// It does not exist here.
    Unsupported,
    /// Its name is too long on the host.
    TooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

/// One rule. `None` for a side that it does not apply to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: Action,
    /// Prefix of the guest's names that match.
    client: Option<Vec<u8>>,
    /// Prefix of the host's names that match.
    server: Option<Vec<u8>>,
    /// Prepended to the guest's names.
    prepend: Vec<u8>,
}

impl Rule {
    /// A rule for both sides.
    fn all(action: Action, key: &[u8], prepend: &[u8]) -> Rule {
        Rule { action, client: Some(key.into()), server: Some(prepend.into()), prepend: prepend.into() }
    }
}

/// The names of the guest's attributes on the host. Every name matches a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrMap(Vec<Rule>);

impl XattrMap {
    /// The host's name for the guest's.
    pub fn to_host<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>, Refusal> {
        let bytes = name.to_bytes();
        let matches = |rule: &&Rule| rule.client.as_ref().is_some_and(|key| bytes.starts_with(key));
        // Without a rule, which cannot be, the attribute stays closed.
        let rule = self.0.iter().find(matches).ok_or(Refusal::Bad)?;
        match rule.action {
            Action::Ok => Ok(Cow::Borrowed(name)),
            Action::Bad => Err(Refusal::Bad),
            Action::Unsupported => Err(Refusal::Unsupported),
            Action::Prefix => {
                let host = [&rule.prepend, bytes].concat();
                if host.len() > NAME_MAX {
                    return Err(Refusal::TooLong);
                }
                CString::new(host).map(Cow::Owned).map_err(|_| Refusal::Bad)
            }
        }
    }

    /// The guest's name for the host's; `None` if the guest does not see it.
    pub fn to_guest<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let matches = |rule: &&Rule| rule.server.as_ref().is_some_and(|start| name.starts_with(start));
        let rule = self.0.iter().find(matches)?;
        match rule.action {
            Action::Ok => Some(name),
            Action::Bad | Action::Unsupported => None,
            Action::Prefix => {
                // The guest sees only names that it can use in requests.
                let key = rule.client.as_deref().unwrap_or_default();
                let rest = name.strip_prefix(rule.prepend.as_slice())?;
                (!rest.is_empty() && rest.starts_with(key)).then_some(rest)
            }
        }
    }
}

impl FromStr for XattrMap {
    type Err = XattrMapError;

    fn from_str(text: &str) -> Result<XattrMap, XattrMapError> {
        let mut rules = Vec::new();
        let mut rest = text.trim_ascii();
        let mut number = 0;
        while !rest.is_empty() {
            number += 1;
            let (fields, after) = split_rule(rest, number)?;
            rest = after.trim_ascii_start();
            match *fields {
                ["map", key, prepend] if rest.is_empty() => {
                    add_map(&mut rules, key.as_bytes(), prepend.as_bytes())
                }
                ["map", ..] => return Err(XattrMapError::MapNotLast(number)),
                [kind, scope, key, prepend] => rules.push(rule(number, kind, scope, key, prepend)?),
                _ => return Err(XattrMapError::Incomplete(number)),
            }
        }
        if rules.is_empty() {
            return Err(XattrMapError::Empty);
        }
        // Rules match prefixes, so only an empty one matches all.
        let is_empty = |start: &Option<Vec<u8>>| start.as_ref().is_some_and(Vec::is_empty);
        if !rules.iter().any(|rule| is_empty(&rule.client)) {
            return Err(XattrMapError::Open("client"));
        }
        if !rules.iter().any(|rule| is_empty(&rule.server)) {
            return Err(XattrMapError::Open("server"));
        }
        Ok(XattrMap(rules))
    }
}

/// Cuts the fields of one rule off the front of a text that is not empty.
fn split_rule(text: &str, number: usize) -> Result<(Vec<&str>, &str), XattrMapError> {
    let incomplete = || XattrMapError::Incomplete(number);
    if text.contains('\0') {
        return Err(XattrMapError::Nul(number));
    }
    let mut characters = text.chars();
    let separator = characters.next().ok_or_else(incomplete)?;
    let mut rest = characters.as_str();
    let mut fields = Vec::new();
    let mut wanted = 4;
    while fields.len() < wanted {
        let (field, after) = rest.split_once(separator).ok_or_else(incomplete)?;
        if fields.is_empty() && field == "map" {
            wanted = 3;
        }
        fields.push(field);
        rest = after;
    }
    Ok((fields, rest))
}

fn rule(number: usize, kind: &str, scope: &str, key: &str, prepend: &str) -> Result<Rule, XattrMapError> {
    let action = match kind {
        "prefix" => Action::Prefix,
        "ok" => Action::Ok,
        "bad" => Action::Bad,
        "unsupported" => Action::Unsupported,
        _ => return Err(XattrMapError::Type(number, kind.to_owned())),
    };
    let mut rule = Rule::all(action, key.as_bytes(), prepend.as_bytes());
    match scope {
        "all" => {}
        "client" => rule.server = None,
        "server" => rule.client = None,
        _ => return Err(XattrMapError::Scope(number, scope.to_owned())),
    }
    Ok(rule)
}

/// The rules that a rule of type map abbreviates: attributes that begin with `key` are prefixed, the prefixed ones cannot
/// be used by their own names, and the host's own `key` attributes are hidden.
fn add_map(rules: &mut Vec<Rule>, key: &[u8], prepend: &[u8]) {
    rules.push(Rule::all(Action::Prefix, key, prepend));
    if key.is_empty() {
        rules.push(Rule::all(Action::Bad, b"", b""));
    } else {
        rules.push(Rule::all(Action::Bad, prepend, key));
        rules.push(Rule::all(Action::Ok, b"", b""));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(text: &str) -> XattrMap {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn host(map: &XattrMap, name: &str) -> Result<String, Refusal> {
        let name = CString::new(name).unwrap();
        map.to_host(&name).map(|name| name.to_str().unwrap().to_owned())
    }

    fn guest(map: &XattrMap, name: &str) -> Option<String> {
        map.to_guest(name.as_bytes()).map(|name| String::from_utf8(name.to_vec()).unwrap())
    }

    #[test]
    fn all_attributes_under_one_prefix() {
        for text in
            [":prefix:all::user.virtiofs.::bad:all:::", ":map::user.virtiofs.:", "  /map//user.virtiofs./ \n"]
        {
            let map = map(text);
            assert_eq!(host(&map, "trusted.a").unwrap(), "user.virtiofs.trusted.a");
            assert_eq!(host(&map, "user.virtiofs.a").unwrap(), "user.virtiofs.user.virtiofs.a");
            assert_eq!(guest(&map, "user.virtiofs.trusted.a").unwrap(), "trusted.a");
            assert_eq!(guest(&map, "user.virtiofs."), None);
            assert_eq!(guest(&map, "trusted.a"), None);
        }
    }

    #[test]
    fn some_attributes_under_a_prefix() {
        let long = "/prefix/all/trusted./user.virtiofs./\n  /bad/server//trusted./
            /bad/client/user.virtiofs.//  /ok/all///";
        for text in [long, ":map:trusted.:user.virtiofs.:"] {
            let map = map(text);
            assert_eq!(host(&map, "trusted.a").unwrap(), "user.virtiofs.trusted.a");
            assert_eq!(host(&map, "user.virtiofs.trusted.a"), Err(Refusal::Bad));
            assert_eq!(host(&map, "user.a").unwrap(), "user.a");
            assert_eq!(guest(&map, "trusted.a"), None);
            assert_eq!(guest(&map, "user.virtiofs.trusted.a").unwrap(), "trusted.a");
            assert_eq!(guest(&map, "user.a").unwrap(), "user.a");
        }
    }

    #[test]
    fn types_and_scopes() {
        let map = map(":unsupported:all:security.selinux:security.selinux::bad:all:security.:security.:\
             :ok:client:user.:::bad:client:::|ok|server||user.|,bad,server,,,");
        assert_eq!(host(&map, "security.selinux"), Err(Refusal::Unsupported));
        assert_eq!(host(&map, "security.ima"), Err(Refusal::Bad));
        assert_eq!(host(&map, "user.x").unwrap(), "user.x");
        assert_eq!(host(&map, "trusted.x"), Err(Refusal::Bad));
        assert_eq!(guest(&map, "security.selinux"), None);
        assert_eq!(guest(&map, "user.x").unwrap(), "user.x");
        assert_eq!(guest(&map, "trusted.x"), None);
    }

    #[test]
    fn prefixed_names_may_be_too_long() {
        let map = map(":map::user.virtiofs.:");
        assert_eq!(host(&map, &"n".repeat(255 - 14)).unwrap().len(), 255);
        assert_eq!(host(&map, &"n".repeat(255 - 13)), Err(Refusal::TooLong));
    }

    #[test]
    fn a_malformed_list_is_refused() {
        use XattrMapError::*;
        for (text, error) in [
            ("", Empty),
            (" \n", Empty),
            (":", Incomplete(1)),
            (":ok:all::", Incomplete(1)),
            (":ok:all::::bad:all", Incomplete(2)),
            (":good:all:::", Type(1, "good".into())),
            (":ok:guest:::", Scope(1, "guest".into())),
            (":ok:all::: :Map:a:b:c:", Type(2, "Map".into())),
            (":map:a:b::ok:all:::", MapNotLast(1)),
            (":map:a:b: :map:c:d:", MapNotLast(1)),
            (":ok:all:\0::", Nul(1)),
            (":ok:client:::", Open("server")),
            (":ok:server:::", Open("client")),
            (":ok:all:user.::", Open("client")),
            (":ok:all::user.:", Open("server")),
        ] {
            assert_eq!(text.parse::<XattrMap>(), Err(error), "{text}");
        }
    }

    /// A list of rules that ends as it has to.
    fn any_list() -> impl Strategy<Value = String> {
        let rule = "(prefix|ok|bad|unsupported):(all|client|server):[ab.]{0,3}:[ab.]{0,3}";
        proptest::collection::vec(rule, 0..5).prop_map(|rules| {
            let text: String = rules.iter().map(|rule| format!(":{rule}:")).collect();
            text + ":ok:all:::"
        })
    }

    proptest! {
        /// Total: any text is a list or refused.
        #[test]
        fn any_text_parses(text in any::<String>(), near in "([ :/]|map|ok|all|bad|prefix|a){0,30}") {
            let _ = text.parse::<XattrMap>();
            let _ = near.parse::<XattrMap>();
        }

        /// Every name has an answer that a system call takes.
        #[test]
        fn any_name_has_an_answer(list in any_list(), name in "[ab.]{1,250}") {
            let map = map(&list);
            if let Ok(host) = host(&map, &name) {
                prop_assert!(host.ends_with(&name) && host.len() <= NAME_MAX);
            }
            if let Some(guest) = guest(&map, &name) {
                prop_assert!(!guest.is_empty() && name.ends_with(&guest));
            }
        }

        /// With a rule of type map, the guest is shown what it set, and nothing that it cannot get.
        #[test]
        fn a_map_goes_both_ways(key in "[ab.]{0,3}", prepend in "[ab.]{1,3}", name in "[ab.]{1,6}") {
            let map = map(&format!(":map:{key}:{prepend}:"));
            if let Ok(host) = host(&map, &name) {
                prop_assert_eq!(guest(&map, &host), Some(name.clone()));
            }
            if let Some(shown) = guest(&map, &name) {
                prop_assert_eq!(host(&map, &shown), Ok(name));
            }
        }
    }
}
