//! What HTTP asks the loop for.

use berth_protocol::delegation::Delegation;
use berth_protocol::join::{JoinRequest, MustWait};
use berth_protocol::sign::{Key, Signer};
use berth_protocol::tls::Party;

use super::{Daemon, RunError};
use crate::core::approval::Admission;
use crate::core::keys::NotRotated;
use crate::core::manage::{Change, NotChanged, about};
use crate::core::members::Joined;
use crate::core::{Actor, Event};
use crate::io::clock;
use crate::io::http::{Inquiry, Report};
use crate::io::random;
use crate::io::vault::Vault;

impl Daemon {
    pub(super) async fn answer(&mut self, inquiry: Inquiry) -> Result<(), RunError> {
        // Whoever asked may have gone.
        match inquiry {
            Inquiry::Report(reply) => {
                let counters = self.controller.counters().clone();
                let (depot_bytes, depot_checkpoints) = self.depot.totals();
                let bus_up = self.bus.is_up();
                let _ = reply.send(Report { bus_up, counters, depot_bytes, depot_checkpoints });
            }
            Inquiry::Grant { node, asked, reply } => {
                let _ = reply.send(self.controller.grant(&node, &asked));
            }
            Inquiry::Change { by, change, reply } => {
                let may = self.controller.may_change(&by, &change);
                match &may {
                    Ok(()) => self.change(by, change).await?,
                    Err(why) => self.refused(by, about(&change), why).await?,
                }
                let _ = reply.send(may);
            }
            Inquiry::Key { by, reply } => {
                let _ = reply.send(self.controller.key_told(&by));
            }
            Inquiry::DrawKey { by, reply } => {
                let drawn = match self.controller.may_draw_key(&by) {
                    Ok(()) => {
                        let seed = self.drawn.insert(random::bytes()?);
                        Ok(Key::from_seed(seed).public())
                    }
                    Err(why) => {
                        self.refused(by, ("draw", "another key for the controller".to_owned()), &why).await?;
                        Err(why)
                    }
                };
                let _ = reply.send(drawn);
            }
            Inquiry::RotateKey { by, delegation, reply } => {
                let _ = reply.send(self.rotate(by, delegation).await?);
            }
            Inquiry::Invitations { by, reply } => {
                let told = self.controller.invitations_told(clock::now(), &by);
                if let Err(why) = &told {
                    self.refused(by, ("view", "tokens".to_owned()), why).await?;
                }
                let _ = reply.send(told);
            }
            Inquiry::Members { by, reply } => {
                let _ = reply.send(self.controller.members_told(&by));
            }
            Inquiry::Secrets { by, namespace, reply } => {
                let told = self.controller.secrets_told(&by, &namespace);
                if let Err(why) = &told {
                    self.refused(by, ("view", format!("namespace {namespace}")), why).await?;
                }
                let _ = reply.send(told);
            }
            Inquiry::Join { from, request, reply } => {
                let joined = self.controller.may_join(clock::now(), &request);
                let JoinRequest { id, key, .. } = *request;
                match joined.clone() {
                    Ok(Admission::Waits(MustWait { node, .. })) => {
                        let (by, party) = (Actor { party: None, from }, Party::Node(node));
                        self.step([Event::Waits(by, Joined { id, party, key })]).await?;
                    }
                    Ok(Admission::Joins(party)) => {
                        let by = Actor { party: Some(party.clone()), from };
                        self.step([Event::Joined(by, Joined { id, party: party.clone(), key })]).await?;
                        self.tell_doors(party, "has joined the cluster");
                    }
                    Err(why) => {
                        let by = Actor { party: None, from };
                        self.refused(by, ("join", format!("token {id}")), &why).await?;
                    }
                }
                let _ = reply.send(joined);
            }
            Inquiry::SecretsOf { node, pod, epoch, reply } => {
                let _ = reply.send(self.controller.secrets_of(&node, &pod, epoch));
            }
            Inquiry::Import { imported, reply } => {
                self.step([Event::Imported(imported)]).await?;
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    /// The key that was drawn last signs from now on, where the root has named it so: recorded first.
    async fn rotate(
        &mut self,
        by: Actor,
        delegation: Box<Delegation>,
    ) -> Result<Result<(), NotChanged>, RunError> {
        let drawn = self.drawn.filter(|seed| Key::from_seed(seed).public() == delegation.key);
        let vault = Vault::of(&self.store.identity().secret);
        let sealed = drawn.map(|seed| vault.seal_seed(&seed)).transpose()?.unwrap_or_default();
        let change = Change::Rotate(delegation.clone(), sealed);
        let may = self.controller.may_change(&by, &change);
        let seed = match may.and_then(|()| drawn.ok_or(NotRotated::NotDrawn.into())) {
            Ok(seed) => seed,
            Err(why) => {
                self.refused(by, about(&change), &why).await?;
                return Ok(Err(why));
            }
        };
        self.change(by, change).await?;
        tracing::info!(
            "key {} signs orders from now on, by the cluster's root, until {}",
            delegation.key.short(),
            delegation.expires
        );
        self.drawn = None;
        let cluster = self.signer.cluster().clone();
        self.signer = Signer::delegated(cluster, Key::from_seed(&seed), (*delegation).clone());
        self.delegation.send_replace(Some(*delegation));
        Ok(Ok(()))
    }

    /// Recorded first; then the doors know.
    async fn change(&mut self, by: Actor, change: Change) -> Result<(), RunError> {
        let whom = match &change {
            Change::Remove(party) => Some((party.clone(), "was removed from the cluster")),
            Change::Set(user, _) => Some((Party::User(user.clone()), "has other roles now")),
            Change::Invite(..)
            | Change::Uninvite(_)
            | Change::Secret(..)
            | Change::Rotate(..)
            | Change::Approve(..) => None,
        };
        self.step([Event::Change(by, change)]).await?;
        if let Some((party, what)) = whom {
            self.tell_doors(party, what);
        }
        Ok(())
    }

    fn tell_doors(&self, party: Party, what: &str) {
        tracing::info!("{party} {what}");
        if let Some(members) = &self.members {
            let member = self.controller.members().get(&party).cloned();
            members.set(party, member);
        }
    }

    async fn refused(
        &mut self,
        actor: Actor,
        (what, on): (&'static str, String),
        why: &impl ToString,
    ) -> Result<(), RunError> {
        self.step([Event::Refused { actor, what, on, why: why.to_string() }]).await
    }
}
