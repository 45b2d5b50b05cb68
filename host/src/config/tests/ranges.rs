//! What is documented of ranges, against what is checked.

use vswitch::spec::SwitchSpec;

use super::*;

#[test]
fn manual_and_contract_name_the_ranges_that_are_checked() {
    fn told<T: std::fmt::Display>(range: std::ops::RangeInclusive<T>) -> (String, String) {
        (range.start().to_string(), range.end().to_string())
    }
    let contract: serde_json::Value = serde_json::from_str(crate::api::OPENAPI).expect("JSON");
    let keys = || reference::GROUPS.iter().flat_map(|group| group.keys);
    let named = |path: &str| keys().find(|key| key.path == path).expect(path).range;
    let port = "switch.NAME.port.PORT";
    for (path, schema, (low, high)) in [
        ("switch.NAME.addresses", "addresses", told(SwitchSpec::ADDRESSES_RANGE)),
        ("switch.NAME.aging", "aging", told(SwitchSpec::AGING_RANGE)),
        (&format!("{port}.mtu"), "mtu", told(PortSpec::MTU_RANGE)),
        (&format!("{port}.tap.queues"), "queues", told(PortSpec::QUEUES_RANGE)),
        (&format!("{port}.vlan.access"), "", told(VlanMode::IDS)),
        (&format!("{port}.security.address-limit"), "", told(SwitchSpec::ADDRESSES_RANGE)),
    ] {
        assert!(named(path).starts_with(&format!("{low} to {high}")), "{path}: {}", named(path));
        let mut ranges = Vec::new();
        find_ranges(&contract["components"]["schemas"], schema, &mut ranges);
        assert!(schema.is_empty() || !ranges.is_empty(), "{schema}");
        assert!(ranges.iter().all(|range| *range == (low.clone(), high.clone())), "{schema}: {ranges:?}");
    }
}

/// The ranges of every integer called `name` in `schema`.
fn find_ranges(schema: &serde_json::Value, name: &str, ranges: &mut Vec<(String, String)>) {
    for (key, value) in schema.as_object().into_iter().flatten() {
        if key == name && value["type"] == "integer" && value["maximum"].is_number() {
            ranges.push((value["minimum"].to_string(), value["maximum"].to_string()));
        }
        find_ranges(value, name, ranges);
    }
}
