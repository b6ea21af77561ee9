//! placeholder
pub struct Bridge;
impl Bridge {
    pub fn set_up(_n: &berth_protocol::ids::NodeId) -> Result<Self, std::io::Error> {
        Ok(Self)
    }
    pub fn address(&self, _slot: u16) -> Result<crate::task::BridgeAddress, std::io::Error> {
        Err(std::io::Error::other("x"))
    }
}
